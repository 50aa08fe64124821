"""Settings as a stage's command shows them; those of the other stage are hidden."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from search_r3_jax.config import DataConfig, RlConfig, RunConfig

T = TypeVar("T")


def sft_settings(config: RunConfig) -> RunConfig:
    """The config for `sft`, with the settings of stage 2 hidden except the sampler, which evaluation uses."""
    data = _hiding(config.data, "rl_queries", "rl_documents", "functions")
    rl = _hiding(config.rl, *(name for name in _fields(config.rl) if name != "sampler"))
    return _hiding(dataclasses.replace(config, data=data, rl=rl), "index")


def rl_settings(config: RunConfig) -> RunConfig:
    """The config for `rl`, with the settings of stage 1 hidden."""
    data = _hiding(config.data, "batches", "weights", "functions")
    return _hiding(dataclasses.replace(config, data=data), "sft")


def run_config(settings: RunConfig) -> RunConfig:
    """Turn a command's settings back into a config, with the hidden ones."""
    data, rl = DataConfig(**_fields(settings.data)), RlConfig(**_fields(settings.rl))
    return RunConfig(**{**_fields(settings), "data": data, "rl": rl})


def _hiding(config: T, *names: str) -> T:
    """The same values in a subclass whose named fields tyro omits: it reads the class of a default."""
    kind: Any = type(config)
    hints = get_type_hints(kind)
    hidden = [(name, Annotated[hints[name], tyro.conf.Suppress]) for name in names]
    subclass = dataclasses.make_dataclass(
        kind.__name__, hidden, bases=(kind,), frozen=True, kw_only=True, namespace={"__doc__": kind.__doc__}
    )
    return subclass(**_fields(config))


def _fields(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
