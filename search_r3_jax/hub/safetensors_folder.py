"""Weights of a Hugging Face folder: one safetensors file or several with an index, read in pieces."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from search_r3_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
_DTYPES = ("F32", "BF16", "F16")
# Of a decoder with its head, and of a decoder alone: `AutoModel.save_pretrained` writes the latter.
_WITH_PREFIX, _WITHOUT_PREFIX = ("model.", "lm_head."), ("embed_tokens.", "layers.", "norm.")
logger = logging.getLogger(__name__)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError when it holds none."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: holds no JSON object; download it again")
    return fields


class SafetensorsFolder:
    """The tensors of a folder under their names in a causal language model; `shapes` lists them.

    As in `transformers`, a name without the prefix `model.` gets it, and tensors beside decoder and head (a
    classifier, a value head) are left out, with a warning. `base_model`: no name had the prefix.

    Raises UserError when a file is missing, damaged, pickled, or of another dtype than float32, bfloat16 or
    float16.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.base_model = True
        self._slices: dict[str, Any] = {}
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{folder / ADAPTER}: the folder holds an adapter, which transformers would put on its base "
                "model; merge it and save the result"
            )
        for file in _files(folder):
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            handle = safe_open(str(file), framework="numpy")
            names = handle.keys()
            slices = {name: handle.get_slice(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file}: not a readable safetensors file ({reason}); download it again"
            ) from None
        others = [name for name in slices if not name.startswith(_WITH_PREFIX + _WITHOUT_PREFIX)]
        if others:
            shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
            logger.warning(f"{file}: {shown}: no part of decoder or head; left out, as in transformers")
        for name, part in slices.items():
            if name not in others:
                self._add(file, name, part)

    def _add(self, file: Path, name: str, part: Any) -> None:
        if part.get_dtype() not in _DTYPES:
            raise UserError(
                f"{file}: {name}: stored as {part.get_dtype()}, which is not supported; use a checkpoint "
                "in bfloat16"
            )
        if name.startswith(_WITH_PREFIX):
            self.base_model = False
            known = name
        else:
            known = f"model.{name}"
        if known in self.shapes:
            raise UserError(
                f"{file}: {name}: the folder holds this tensor twice, in two files or with and without "
                "'model.'; download the folder again"
            )
        self.shapes[known] = tuple(part.get_shape())
        self._slices[known] = part

    def rename(self, name: str, new: str) -> None:
        """Give a tensor another name."""
        self.shapes[new], self._slices[new] = self.shapes.pop(name), self._slices.pop(name)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor as float32; only this part is read into memory."""
        return np.asarray(self._slices[name][index], dtype=np.float32)


def _files(folder: Path) -> list[Path]:
    """The files of the weights; one file goes before an index beside it, which is left over, as in
    `transformers`."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: *.bin: pickled weights are never read; convert the checkpoint to safetensors"
        )
    raise UserError(f"{folder}: {SINGLE}: missing; weights are read from safetensors only")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise UserError(
            f"{index}: weight_map: missing or not a table from tensors to files; download it again"
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # A file of this folder by its bare name: an index must not reach outside.
        if not shard.endswith(".safetensors") or "/" in shard or "\\" in shard or "\0" in shard:
            raise UserError(
                f"{index}: weight_map: {shard!r} is not a safetensors file of this folder; download it again"
            )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(f"{index}: {', '.join(missing)}: missing; download the folder again")
    return [folder / shard for shard in shards]
