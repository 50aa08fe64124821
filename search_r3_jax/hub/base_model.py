"""What a base model says of itself: its id on the Hugging Face hub, and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from search_r3_jax.hub.gguf_header import read_header
from search_r3_jax.hub.model_names import EXPORT_MANIFEST, HUB_ID, PACKAGED, is_hub_id, resolve

# The packaged file does not say which of the published models it is.
PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = "README.md"
_LICENSE_FILES = re.compile(r"(?:LICEN[CS]E|COPYING)(?:\.(?:txt|md))?", re.IGNORECASE)
# What a licence's text begins with, in any order of these words, and its identifier on the hub.
_KNOWN = (
    (re.compile(r"Apache License\s+Version 2\.0"), "apache-2.0"),
    (re.compile(r"\bMIT License\b"), "mit"),
    (re.compile(r"LLAMA 2 COMMUNITY LICENSE"), "llama2"),
    (re.compile(r"META LLAMA 3 COMMUNITY LICENSE"), "llama3"),
    (re.compile(r"LLAMA 3\.([123]) COMMUNITY LICENSE"), r"llama3.\1"),
)
_BEGINNING = 4000
_HUB = "https://huggingface.co/"


@dataclass(frozen=True, kw_only=True)
class License:
    """A licence: its identifier on the hub, and for `other` its name and a link, where these are known."""

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that another one was made of.

    Attributes:
        name: what people call it: its id on the hub, else the name of its folder or file.
        hub_id: its id on the hub; None where nothing tells it.
        license: None where nothing tells it.
        license_file: the text of its licence; None where it has no such file.
    """

    name: str
    hub_id: str | None = None
    license: License | None = None
    license_file: Path | None = None


def base_model(name: str) -> BaseModel:
    """What is known of a model that is no run, from its own card, its licence file or its GGUF fields.

    Raises UserError where there is no such model.
    """
    path = resolve(name)
    if path.is_file():
        fields = _gguf_fields(path)
        hub_id = PACKAGED_ID if name == PACKAGED else _id_in(fields.get("general.base_model.0.repo_url"))
        found = _license_of(fields, "general.license", ".name", ".link")
        return BaseModel(name=hub_id or path.name, hub_id=hub_id, license=found)
    card = _card_of(path)
    hub_id = name.partition("@")[0] if is_hub_id(name) else _id_of_snapshot(path)
    if (path / EXPORT_MANIFEST).is_file():
        # Made of another model, as its card says.
        hub_id = hub_id or _id_in(card.get("base_model"))
    file = _license_file(path)
    found = _license_of(card, "license", "_name", "_link")
    if found is None and file is not None:
        found = _license_in(file)
    if found is not None and found.link is not None and "://" not in found.link:
        found = License(identifier=found.identifier, name=found.name, link=_link(found.link, hub_id, file))
    return BaseModel(name=hub_id or path.resolve().name, hub_id=hub_id, license=found, license_file=file)


def renamed_base(base: BaseModel | None, name: str) -> BaseModel:
    """The checkpoint `name` as base of adapters, which a run knows as `base`: its licence is the same."""
    if Path(name).is_dir():
        return base_model(name)
    hub_id = _id_in(name)
    if base is None:
        return BaseModel(name=name, hub_id=hub_id)
    return replace(base, name=name, hub_id=hub_id)


def _gguf_fields(path: Path) -> Mapping[str, Any]:
    return read_header(path, np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))).fields


def _card_of(folder: Path) -> Mapping[str, Any]:
    """The metadata of a model's card; empty where there is none that can be read."""
    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _license_of(fields: Mapping[str, Any], key: str, name: str, link: str) -> License | None:
    identifier = fields.get(key)
    if isinstance(identifier, list) and len(identifier) == 1:
        identifier = identifier[0]
    if not isinstance(identifier, str) or not identifier.strip():
        return None
    return License(
        identifier=identifier.strip(), name=_text(fields.get(key + name)), link=_text(fields.get(key + link))
    )


def _text(value: object) -> str | None:
    return value.strip() if isinstance(value, str) and value.strip() else None


def _license_file(folder: Path) -> Path | None:
    found = sorted(file for file in folder.iterdir() if _LICENSE_FILES.fullmatch(file.name))
    return found[0] if found and found[0].is_file() else None


def _license_in(file: Path) -> License:
    """The licence that a text is; `other` for one that is not known here."""
    text = file.read_text(encoding="utf-8", errors="replace")[:_BEGINNING]
    for pattern, identifier in _KNOWN:
        if found := pattern.search(text):
            return License(identifier=found.expand(identifier))
    return License(identifier="other", link=file.name)


def _link(relative: str, hub_id: str | None, file: Path | None) -> str | None:
    """Where a link to a file beside the base model leads from elsewhere; a copied file is there too."""
    if file is not None and relative == file.name:
        return relative
    return f"{_HUB}{hub_id}/blob/main/{relative}" if hub_id else None


def _id_of_snapshot(path: Path) -> str | None:
    """The id of a model that lies in the cache of the hub's own library."""
    for part in path.resolve().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return _id_in(part.removeprefix("models--").replace("--", "/"))
    return None


def _id_in(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    name = value.removeprefix(_HUB).rstrip("/")
    return name if HUB_ID.fullmatch(name) else None
