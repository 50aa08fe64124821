"""Export of a decoder to a Hugging Face folder for `transformers`, sentence-transformers and `Embedder`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json
from search_r3_jax.hub.base_model import CARD
from search_r3_jax.hub.folders import replaced_folder
from search_r3_jax.hub.load_model import LoadedModel, torch_tensors
from search_r3_jax.hub.model_card import model_card
from search_r3_jax.hub.model_facts import ModelFacts
from search_r3_jax.hub.model_names import EXPORT_MANIFEST
from search_r3_jax.hub.sentence_transformers import write_sentence_transformers
from search_r3_jax.models.families import config_to_hf
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.text.pieces import control_tokens
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM, Prompter, Prompts

SHARD_BYTES = 4 << 30
MAX_TOKENS = 512
_PROMPTS = {
    "embed_token": EMBED_TOKEN,
    "direct_system": DIRECT_SYSTEM,
    "reason_system": REASON_SYSTEM,
    "closing": CLOSING,
}


def export_model(
    model: LoadedModel,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_tokens: int = MAX_TOKENS,
    shard_bytes: int = SHARD_BYTES,
    facts: ModelFacts | None = None,
) -> Path:
    """Write weights, configs, tokenizer, prompts, sentence-transformers files and a model card atomically.

    Adapters are merged. `max_tokens` of a text's tokens are read by default, fewer if the model has fewer
    positions; `shard_bytes` bounds a weight file. The card tells the `facts`. An earlier export at `out` is
    replaced once the new one is complete. Raises UserError when `out` is anything else or cannot be written,
    and when a weight is not finite.
    """
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model.decoder, nnx.Param)))
    size = parameters * (4 if dtype == "float32" else 2)
    with replaced_folder(out, marker=EXPORT_MANIFEST, size=size) as folder:
        described = _write(model, folder, dtype, max_tokens, shard_bytes)
        facts, name = facts or ModelFacts(), out.resolve().name
        card = model_card(model.prompter(), facts, name=name, sentence_transformers=described)
        write_card(folder, card, facts)
    return out


def _write(
    model: LoadedModel, folder: Path, dtype: Literal["float32", "bfloat16"], max_tokens: int, shard_bytes: int
) -> bool:
    """Write everything but the card; return whether sentence-transformers can read the folder."""
    decoder = merge_lora(model.decoder)
    tokenizer, prompter = model.tokenizer, model.prompter()
    write_weights(torch_tensors(decoder), folder, dtype, shard_bytes)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(folder / "config.json", config_to_hf(decoder.config, dtype) | ends)
    # Generation ends at the embed token or at any end of the turn. Greedy, as in our evaluation: sampling
    # settings of the base model, such as a repetition penalty, would change the reasoning.
    write_json(
        folder / "generation_config.json",
        ends | {"do_sample": False, "eos_token_id": [*prompter.end_ids, model.embed_id]},
    )
    save_tokenizer(tokenizer, folder)
    read = min(max_tokens, max_text_tokens(prompter, decoder.config.max_positions))
    write_export_manifest(folder, model.embed_id, prompter.prompts, max_tokens=read)
    return write_sentence_transformers(
        folder, prompter, dimension=decoder.config.hidden_size, max_tokens=read
    )


def write_card(folder: Path, card: str, facts: ModelFacts) -> None:
    """Write `README.md`, and beside it the licence of the base model where that has a file of it."""
    (folder / CARD).write_text(card, encoding="utf-8")
    if facts.base is not None and facts.base.license_file is not None:
        shutil.copyfile(facts.base.license_file, folder / facts.base.license_file.name)


def max_text_tokens(prompter: Prompter, max_positions: int) -> int:
    """Number of tokens of a text that fit into `max_positions` beside the prompt.

    Raises UserError when not one does.
    """
    direct = prompter.direct
    prompt = len(direct.prefix) + len(direct.suffix) + len(direct.closing)
    if prompt >= max_positions:
        raise UserError(
            f"model: max_position_embeddings: {max_positions} leaves no room for a text beside the {prompt} "
            "tokens of the prompt; use a model with more positions"
        )
    return max_positions - prompt


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`save_pretrained`, with all control tokens listed for `apply_chat_template`.

    Its native part reports a full disk as a bare Exception; here it is an OSError.
    """
    controls = control_tokens(tokenizer)
    if any(not tokenizer.added_tokens_decoder[i].special for i in controls.values()):
        # sentence-transformers reads the names of these tokens as text, as our prompter does.
        tokenizer.chat_control_tokens = sorted(controls)
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        raise OSError(str(error)) from error


def write_export_manifest(folder: Path, embed_id: int, prompts: Prompts, *, max_tokens: int) -> None:
    """Write `search_r3.json`: the prompts, rendered, and the pooling that the weights were trained with."""
    pooling = "state after the final norm at the embed token, L2-normalised in float32"
    write_json(
        folder / EXPORT_MANIFEST,
        _PROMPTS
        | {"prompts": prompts.to_json(), "embed_token_id": embed_id}
        | {"pooling": pooling, "max_tokens": max_tokens},
    )


def read_export_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of `search_r3.json`, None if there is none; raises UserError for other prompts."""
    file = folder / EXPORT_MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); export the model again") from None
    for field, ours in _PROMPTS.items():
        if manifest.get(field) != ours:
            raise UserError(
                f"{file}: {field}: differs from this version's; use the version of search_r3_jax that "
                "exported the model"
            )
    if not isinstance(manifest.get("max_tokens"), int):
        raise UserError(f"{file}: max_tokens: missing or not a number; export the model again")
    return manifest


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file for torch with the usual permissions; `save_file` allows only its owner.

    Raises UserError naming the first tensor with a number that is not finite.
    """
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{name}: holds numbers that are not finite as {tensor.dtype}, so no reader could embed; "
                "export an earlier checkpoint, or another dtype"
            )
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(mode)


def write_weights(
    tensors: Iterable[tuple[str, np.ndarray]], folder: Path, dtype: str, shard_bytes: int
) -> None:
    """Write safetensors files of at most `shard_bytes` (or one tensor), and an index for several files."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        save_tensors(held, folder / f"{len(shards)}.part")
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        stored = np.ascontiguousarray(tensor.astype(bfloat16 if dtype == "bfloat16" else np.float32))
        if held and size + stored.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = stored
        size += stored.nbytes
        total += stored.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
