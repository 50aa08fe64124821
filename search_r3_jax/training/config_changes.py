"""Compares the settings of two calls on one run, and separates harmless changes from others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "nothing"

# Fields, or sections, that do not change the result (but for the order of additions on other devices), or
# only time checkpoints, evaluations and index versions: the schedule on the disk keeps the versions used so
# far.
HARMLESS = (
    # The folder of the data; `data_version` identifies its content.
    "data",
    "config.data.sets",
    "config.remat",
    "config.attention",
    "config.mesh",
    "config.sft.eval_every",
    "config.sft.save_every",
    "config.sft.keep",
    "config.sft.keep_every",
    "config.sft.max_skipped",
    "config.rl.eval_every",
    "config.rl.save_every",
    "config.rl.keep",
    "config.rl.keep_every",
    "config.rl.sample_every",
    "config.rl.max_skipped",
    "config.rl.collapse.steps",
    "config.rl.collapse.valid_rate",
    "config.rl.collapse.entropy",
    "config.rl.min_swaps",
    "config.rl.max_extra_steps",
    "config.index.drift_every",
    "config.index.drift_documents",
    "config.index.drift_cosine",
    "config.index.drift_overlap",
    "config.index.max_index_age_steps",
    "config.index.on_stale_index",
    "config.index.recall_gate",
    "config.index.keep_versions",
    "config.index.local",
    "config.index.silent_seconds",
    "config.index.nice",
    "config.index.threads",
    "config.index.cores",
    "config.index.mesh",
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One setting of a run that has another value now.

    `field` is its path, for example `config.sft.steps`.
    """

    field: str
    before: Any
    now: Any

    @property
    def harmless(self) -> bool:
        """Whether the run stays the same run."""
        return any(self.field == name or self.field.startswith(f"{name}.") for name in HARMLESS)

    def __str__(self) -> str:
        return f"{self.field} was {self.before}, is {self.now}"


def changes_of(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Every field that differs, in alphabetical order."""
    return list(_changes(before, now, ""))


def describe_changes(changes: Sequence[Change]) -> str:
    """The changes in one line."""
    return "; ".join(str(change) for change in changes)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[Change]:
    for key in sorted({*before, *now}):
        old, new = before.get(key, MISSING), now.get(key, MISSING)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new and not (old in (None, MISSING) and new in (None, MISSING)):
            yield Change(field=f"{prefix}{key}", before=old, now=new)
