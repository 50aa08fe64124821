"""Compares the settings of two calls on one run, and separates harmless changes from others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from search_r3_jax.config import RunConfig, config_from_dict
from search_r3_jax.training.optimizer import learning_rates

MISSING = "nothing"
# Characters of a value in a table or a line.
MOST_CHARACTERS = 40
HASHES = {"corpus_hash": "documents", "queries_hash": "queries and judgements"}

# Fields, or sections, that do not change the result (but for the order of additions on other devices), or
# only time checkpoints, evaluations and index versions: the schedule on the disk keeps the versions used so
# far.
HARMLESS = (
    # The folder of the data, and its sizes; `data_version` identifies its content.
    "data",
    "data_sizes",
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
        return f"{self.field} was {_plain(self.before)}, is {_plain(self.now)}"

    def row(self) -> tuple[str, str, str]:
        """Its row of a table: the setting, the value of the run, and that of this call."""
        section, _, name = self.field.rpartition(".")
        if section.startswith("data_version") and name in HASHES:
            # Nobody compares hashes by eye.
            return f"data: {HASHES[name]}", "as they were", "other ones"
        return self.field.removeprefix("config."), _plain(self.before), _plain(self.now)


class LongerRun(NamedTuple):
    """Changes that only let a run take more steps, and a sentence for each of the others that would."""

    harmless: list[Change]
    explained: list[str]


def changes_of(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Every field that differs, in alphabetical order."""
    return list(_changes(before, now, ""))


def describe_changes(changes: Sequence[Change]) -> str:
    """The changes in one line."""
    return "; ".join(str(change) for change in changes)


def change_table(changes: Sequence[Change]) -> list[str]:
    """The changes as aligned lines: setting, this run, asked."""
    rows = [("setting", "this run", "asked"), *(change.row() for change in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows]


def longer_run(changes: Sequence[Change], record: Mapping[str, Any], done: int) -> LongerRun:
    """Of the changes those of `steps` that leave the `done` steps of a run as they are.

    More steps do, where the schedule gives the steps so far the same learning rates; so does any number of
    steps of the other stage. `record` is what `config.json` shall hold.
    """
    harmless, explained = [], []
    stage, config = record["stage"], config_from_dict(RunConfig, record["config"])
    optimizer = config.sft.optimizer if stage == "sft" else config.rl.optimizer
    epochs = config.rl.inner_epochs if stage == "rl" else 1
    for change in changes:
        if change.field not in ("config.sft.steps", "config.rl.steps"):
            continue
        if change.field != f"config.{stage}.steps":
            harmless.append(change)
        elif change.now > change.before:
            before, now = (learning_rates(optimizer, steps * epochs) for steps in (change.before, change.now))
            updates = min(done * epochs, len(before), len(now))
            if np.array_equal(before[:updates], now[:updates]):
                harmless.append(change)
            else:
                explained.append(
                    f"{stage}.steps: the decay of {stage}.optimizer.schedule {optimizer.schedule} ends at "
                    f"the last step, so the {done} steps so far would have had other learning rates"
                )
    return LongerRun(harmless, explained)


def _plain(value: Any) -> str:
    """A value as a person writes it, cut."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "none"}[value]
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, Mapping):
        # Data: its name and split tell what it is.
        text = (
            f"{value['name']} ({value.get('split')})"
            if "name" in value
            else json.dumps(value, sort_keys=True)
        )
    elif isinstance(value, list | tuple):
        text = " ".join(map(_plain, value)) or "none"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[Change]:
    for key in sorted({*before, *now}):
        old, new = before.get(key, MISSING), now.get(key, MISSING)
        if _are_sets(old) and _are_sets(new) and len(old) == len(new):
            old, new = (dict(zip(map(str, range(len(each))), each, strict=True)) for each in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new and not (old in (None, MISSING) and new in (None, MISSING)):
            yield Change(field=f"{prefix}{key}", before=old, now=new)


def _are_sets(value: Any) -> bool:
    """Whether a value lists data sets, which are compared one by one."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
