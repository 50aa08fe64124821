"""Reads configs back from JSON: settings of older runs under their present names, unknown ones refused."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from search_r3_jax.errors import UserError

# Path of a setting in older runs → its path now, or None where it decides nothing any more.
RENAMED: dict[str, str | None] = {
    "data.source": None,
    "data.train_functions": "data.functions.train",
    "data.dev_functions": "data.functions.dev",
    "data.test_functions": "data.functions.test",
    "data.test_queries": "data.functions.test_queries",
    "rl.snapshot_every": "rl.save_every",
    "rl.reward": "rl.reward.variant",
    "rl.reward_temperature": "rl.reward.temperature",
    "rl.margin_weight": "rl.reward.margin_weight",
    "rl.margin_width": "rl.reward.margin_width",
    "rl.hard_negatives": "rl.reward.hard_negatives",
    "rl.floor_gap": "rl.reward.floor_gap",
    "rl.length_weight": "rl.reward.length_weight",
    "rl.free_tokens": "rl.reward.free_tokens",
    "rl.infonce_weight": "rl.infonce.weight",
    "rl.infonce_negatives": "rl.infonce.negatives",
    "rl.infonce_alike": "rl.infonce.near_duplicate_cosine",
    "rl.infonce_train_documents": "rl.infonce.train_documents",
    "rl.infonce_temperature": "rl.infonce.temperature",
    "rl.collapse_steps": "rl.collapse.steps",
    "rl.collapse_valid": "rl.collapse.valid_rate",
    "rl.collapse_entropy": "rl.collapse.entropy",
    "index.overlay_max_age": "index.overlay_max_age_steps",
    "index.max_age": "index.max_index_age_steps",
    "index.when_old": "index.on_stale_index",
    "index.rolling_documents": "index.documents_per_step",
}


def config_from_dict(kind: Any, fields: Mapping[str, Any]) -> Any:
    """A config dataclass from what `dataclasses.asdict` and JSON left of it.

    Missing settings get their default; names of older runs are read as the present ones. Raises UserError
    for a setting that is neither.
    """
    return _build(kind, _with_present_names(fields), "")


def renamed_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments with renamed setting flags under their present names, and a note on each."""
    replaced, notes = [], []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        path = flag.removeprefix("--").replace("-", "_")
        present = RENAMED.get(path) if flag.startswith("--") else None
        if present is None:
            replaced.append(argument)
            continue
        now = f"--{present.replace('_', '-')}"
        replaced.append(f"{now}{equals}{value}")
        notes.append(f"{flag} is now {now}")
    return replaced, notes


def _with_present_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = copy.deepcopy(dict(fields))
    for before, now in RENAMED.items():
        section, name = before.split(".")
        values = renamed.get(section)
        # A section may have taken the name of a setting: `rl.reward` was a word.
        if not isinstance(values, dict) or name not in values or isinstance(values[name], dict):
            continue
        value = values.pop(name)
        if now is not None:
            *sections, last = now.split(".")
            target = renamed
            for each in sections:
                target = target.setdefault(each, {})
            target.setdefault(last, value)
    return renamed


def _build(kind: Any, fields: Mapping[str, Any], prefix: str) -> Any:
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"{prefix}{name}: no such setting; the nearest is {prefix}{nearest[0]}")
    values = {}
    for name, entry in known.items():
        factory, default = entry.default_factory, entry.default
        default = factory() if factory is not dataclasses.MISSING else default
        if name not in fields and default is not dataclasses.MISSING:
            values[name] = default
        elif dataclasses.is_dataclass(default):
            values[name] = _build(type(default), fields[name], f"{prefix}{name}.")
        else:
            values[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
    return kind(**values)
