"""Settings as the help of a command shows them: without those that do not concern it, which it takes too."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from search_r3_jax.config import RunConfig

T = TypeVar("T")


def sft_settings(config: RunConfig) -> RunConfig:
    """The config for `sft`, without stage 2; only the budget of the reasoned evaluation is left of it."""
    data = _hiding(config.data, "rl_queries", "rl_documents", "functions")
    sampler = _hiding(config.rl.sampler, "temperature", "top_k", "top_p")
    others = (entry.name for entry in dataclasses.fields(config.rl) if entry.name != "sampler")
    rl = _hiding(dataclasses.replace(config.rl, sampler=sampler), *others)
    return _hiding(dataclasses.replace(config, data=data, rl=rl), "index")


def rl_settings(config: RunConfig) -> RunConfig:
    """The config for `rl`, without stage 1."""
    data = _hiding(config.data, "batches", "weights", "functions")
    text = _hiding(config.text, "max_thought_tokens")
    return _hiding(dataclasses.replace(config, data=data, text=text), "sft")


def plan_settings(config: RunConfig) -> RunConfig:
    """The config for `plan`, which reads no data."""
    return _hiding(config, "data")


def _hiding(config: T, *names: str) -> T:
    """The same values in a subclass whose named fields tyro leaves out: it goes by the class of a default."""
    kind: Any = type(config)
    hints = get_type_hints(kind)
    hidden = [(name, Annotated[hints[name], tyro.conf.Suppress]) for name in names]
    subclass = dataclasses.make_dataclass(
        kind.__name__, hidden, bases=(kind,), frozen=True, kw_only=True, namespace={"__doc__": kind.__doc__}
    )
    return subclass(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(kind)})
