"""Loading of any model that `--model` names: packaged, GGUF, Hugging Face folder or id, or run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import InferenceConfig, LoraConfig, ModelConfig, Step
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import (
    read_checkpoint,
    read_run,
    resolve_step,
    starting_model,
    starting_step,
)
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.model_names import EXPORT_MANIFEST, resolve
from search_r3_jax.hub.safetensors_folder import SafetensorsFolder, read_json
from search_r3_jax.hub.weights import EMBEDDING, HEAD, build_decoder, torch_tensors
from search_r3_jax.mesh import mesh_from_config, param_shardings, placed
from search_r3_jax.models.attention import Backend
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.hf_config import config_from_hf
from search_r3_jax.models.lora import add_lora, merge_lora, trainable_filter
from search_r3_jax.text.prompts import Prompter, Prompts, prompts_from_json
from search_r3_jax.text.tokenizer import add_embed_token, tokenizer_from_folder, tokenizer_from_gguf

__all__ = [
    "LoadedModel",
    "build_decoder",
    "load_for_inference",
    "load_model",
    "model_config",
    "pinned_step",
    "torch_tensors",
    "with_lora",
    "with_recorded_prompts",
]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A decoder with its tokenizer, the id of `<|embed_token|>`, and its mesh (None: one device).

    Attributes:
        prompts: those recorded by the run or the export that the model is from. None: the chat template's.
        end_ids: tokens that end a turn, beside the tokenizer's own.
        trained: the model knows its embed token; otherwise its row is new, and vectors mean little.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    embed_id: int
    mesh: Mesh | None = None
    prompts: Prompts | None = None
    end_ids: tuple[int, ...] = ()
    trained: bool = True

    def prompter(self) -> Prompter:
        """Turns texts into the model's token ids; raises UserError where its chat template fails."""
        return Prompter(self.tokenizer, self.prompts, end_ids=self.end_ids)


def load_model(
    name: str | Path,
    *,
    step: Step = None,
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: Backend = "xla",
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
) -> LoadedModel:
    """Load the model that `name` means (see `resolve`), with `<|embed_token|>` added if it is missing.

    Parameters are sharded over `mesh`; matrices are of `param_dtype`, the rest float32. `step` chooses a
    checkpoint when `name` is a run directory: a number, `best`, or None for the newest. Raises UserError when
    the model cannot be read.
    """
    path = resolve(name)
    if (path / "checkpoints").is_dir():
        loaded = _load_run(path, step, compute_dtype, remat, attention, mesh)
        return replace(loaded, decoder=_with_matrices(loaded.decoder, param_dtype))
    _refuse_step(name, step, "--step")
    if path.is_dir():
        config = _folder_config(path / "config.json")
        tokenizer = tokenizer_from_folder(path)
        source = SafetensorsFolder(path)
        config = _with_head(config, source, path)
        manifest = path / EXPORT_MANIFEST
        recorded = read_json(manifest).get("prompts") if manifest.is_file() else None
        prompts, end_ids = prompts_from_json(recorded, str(manifest)), _end_ids(path)
    else:
        source = GgufFile(path)
        config = source.config
        fields = source.tokenizer_fields()
        tokenizer = tokenizer_from_gguf(fields, str(path))
        prompts, end_ids = None, tuple(fields["ends"])
    embed = add_embed_token(tokenizer, config.vocab_size, where=str(path))
    decoder = build_decoder(
        config,
        source,
        where=str(path),
        embed=embed,
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        mesh=mesh,
        param_dtype=param_dtype,
    )
    return LoadedModel(
        decoder=decoder,
        tokenizer=embed.tokenizer,
        embed_id=embed.embed_id,
        mesh=mesh,
        prompts=prompts,
        end_ids=tuple(i for i in end_ids if i < embed.vocab_size),
        trained=not embed.fresh,
    )


def load_for_inference(name: str | Path, inference: InferenceConfig, *, step: Step = None) -> LoadedModel:
    """`load_model` with the precision and on the devices that `inference` names."""
    return load_model(
        name,
        step=step,
        compute_dtype=inference.compute_dtype,
        param_dtype=inference.param_dtype,
        mesh=mesh_from_config(inference.mesh),
    )


def pinned_step(model: str | Path, step: Step, *, flag: str = "--step") -> int | None:
    """The number of the checkpoint that `step` means now, before the run writes another; None for no run.

    Raises UserError for a step of a model without checkpoints; `flag` names the option in the message.
    """
    path = resolve(model)
    if (path / "checkpoints").is_dir():
        return resolve_step(path, step)
    _refuse_step(model, step, flag)
    return None


def _refuse_step(model: str | Path, step: Step, flag: str) -> None:
    """Raise UserError for a step of a model that is no run."""
    if step is not None:
        raise UserError(f"{flag}: {model}: is no run, so it has no checkpoints; leave it out")


def _load_run(
    run: Path, step: Step, compute_dtype: str, remat: str, attention: Backend, mesh: Mesh | None
) -> LoadedModel:
    """The model of a run's checkpoint, with merged adapters."""
    config, run_json = read_run(run)
    chosen = resolve_step(run, step)
    start = load_model(
        starting_model(run, run_json),
        step=starting_step(run_json),
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        mesh=mesh,
    )
    decoder = with_lora(start, config.lora, seed=config.seed).decoder
    params = nnx.state(decoder, trainable_filter(decoder))
    nnx.update(decoder, read_checkpoint(run, chosen, params))
    trained = replace(start, decoder=_on_mesh(merge_lora(decoder), mesh), trained=start.trained or chosen > 0)
    return with_recorded_prompts(trained, run, run_json)


def with_recorded_prompts(model: LoadedModel, run: Path, run_json: Mapping[str, Any]) -> LoadedModel:
    """The model with the prompts and the ends of a turn that a run recorded.

    A run of an older version recorded none. Raises UserError where the record is damaged.
    """
    prompts = prompts_from_json(run_json.get("prompts"), str(run / "config.json"))
    if prompts is None:
        return model
    end_ids = _id_list(run_json.get("end_ids"), run / "config.json", "end_ids")
    return replace(model, prompts=prompts, end_ids=end_ids)


def with_lora(model: LoadedModel, lora: LoraConfig, *, seed: int) -> LoadedModel:
    """The model with fresh adapters for training; unchanged when the rank is 0."""
    if lora.rank == 0:
        return model
    return replace(model, decoder=_on_mesh(add_lora(model.decoder, lora, seed=seed), model.mesh))


def _on_mesh(decoder: Decoder, mesh: Mesh | None) -> Decoder:
    """The decoder with every parameter sharded over the mesh; parameters in place are not copied."""
    if mesh is not None:
        params = nnx.state(decoder, nnx.Param)
        nnx.replace_by_pure_dict(
            params, jax.tree.map(placed, nnx.to_pure_dict(params), param_shardings(decoder, mesh))
        )
        nnx.update(decoder, params)
    return decoder


def _with_matrices(decoder: Decoder, dtype: str) -> Decoder:
    """The decoder with its matrices in another dtype. A run's adapters were merged into them in float32."""
    if dtype != "float32":
        for path, variable in nnx.iter_graph(decoder):
            if isinstance(variable, nnx.Param) and path[-1] in ("kernel", "embedding", "head"):
                variable.set_value(variable[...].astype(dtype))
    return decoder


def model_config(name: str | Path) -> ModelConfig:
    """The architecture of a model; that of a run is its starting model's.

    Raises UserError when it cannot be read.
    """
    path = resolve(name)
    if (path / "checkpoints").is_dir():
        _, run_json = read_run(path)
        return model_config(starting_model(path, run_json))
    return _folder_config(path / "config.json") if path.is_dir() else GgufFile(path).config


def _end_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which `generate` of transformers stops: of generation_config.json, else of config.json."""
    file = folder / "generation_config.json"
    if not file.is_file():
        file = folder / "config.json"
    return _id_list(read_json(file).get("eos_token_id"), file, "eos_token_id")


def _id_list(value: object, file: Path, field: str) -> tuple[int, ...]:
    entries = [] if value is None else value if isinstance(value, list) else [value]
    # bool is a kind of int in Python.
    ids = [entry for entry in entries if isinstance(entry, int) and not isinstance(entry, bool)]
    if len(ids) < len(entries):
        raise UserError(f"{file}: {field}: {value!r}; give the id of a token, or a list of ids")
    return tuple(i for i in ids if i >= 0)


def _with_head(config: ModelConfig, source: SafetensorsFolder, folder: Path) -> ModelConfig:
    """The config of a folder that holds one of two tables.

    Of tied tables either may be stored. A base model saved without its head takes the embedding table for
    one; its embeddings need none.
    """
    if config.tied_embeddings and HEAD in source.shapes and EMBEDDING not in source.shapes:
        source.rename(HEAD, EMBEDDING)
    if config.tied_embeddings or not source.base_model or HEAD in source.shapes:
        return config
    logger.warning(
        f"{folder}: {HEAD}: missing; the embedding table takes its place, so what the model writes means "
        "little before training"
    )
    return replace(config, tied_embeddings=True)


def _folder_config(file: Path) -> ModelConfig:
    if not file.is_file():
        raise UserError(f"{file}: missing; {file.parent} is not a Hugging Face checkpoint folder")
    fields = read_json(file)
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else "unnamed"
        raise UserError(
            f"{file}: quantization_config: {method} weights are not supported; use the unquantised "
            "checkpoint or a GGUF file"
        )
    try:
        return config_from_hf(fields, str(file))
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{file}: a field has a value of the wrong kind ({error}); download it again"
        ) from None
