"""Settings of the index's age, and an environment that holds its rewards against full re-encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from search_r3_jax.retrieval.environment.drift import measure_drift, probe_rows
from search_r3_jax.retrieval.environment.environment import EncodeDocuments, Environment, StepResult
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.training import live_index

TIMES = (0, 1, 10, 30)
# Steps between two indexes at age 1×.
PERIOD = 4
SHARE_A_PERIOD = 0.1
OVERLAY_MAX_AGE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table: how many steps an index is used for, and how many documents a step may encode
    anew."""

    times: int
    overlay: bool

    @property
    def period(self) -> int:
        return self.times * PERIOD

    def version_at(self, step: int) -> int:
        """The checkpoint that the index in use at a step was made from."""
        return step if self.period == 0 else max(0, step // self.period - 1) * self.period

    @property
    def name(self) -> str:
        return f"{self.times}×" + (", overlay" if self.overlay else "")


# With the whole corpus just encoded there is nothing left for an overlay to do.
SETTINGS = [
    Setting(times=times, overlay=overlay)
    for times in TIMES
    for overlay in (False, True)
    if times or not overlay
]


def agreement(rewards: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Kendall's τ-b of rewards [Q,G]: over all, and the mean over the groups in which both tell completions
    apart."""
    groups = [
        tau_b(ours, theirs)
        for ours, theirs in zip(rewards, truth, strict=True)
        if min(np.ptp(ours), np.ptp(theirs)) > 0
    ]
    return {
        "tau": tau_b(rewards.ravel(), truth.ravel()),
        "tau_within_groups": float(np.mean(groups)) if groups else float("nan"),
        "mean_difference": float(np.abs(rewards - truth).mean()),
    }


def tau_b(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kendall's τ-b of two orders [n]."""
    found: Any = kendalltau(ours, theirs)
    return float(found.statistic)


class Indexes:
    """The whole corpus under the parameters of some steps."""

    def __init__(self, ids: Sequence[str], encode: EncodeDocuments):
        self._ids, self._encode, self._made = ids, encode, dict[int, ExactIndex]()

    def make(self, step: int) -> ExactIndex:
        """The index of a step; to be called while the parameters are that step's."""
        if step not in self._made:
            vectors = np.asarray(self._encode(np.arange(len(self._ids), dtype=np.int32)))
            self._made[step] = ExactIndex(vectors, self._ids, step)
        return self._made[step]

    def __getitem__(self, step: int) -> ExactIndex:
        return self._made[step]

    def forget_before(self, step: int) -> None:
        """Drop the indexes that no setting will ask for again."""
        self._made = {
            version: index for version, index in self._made.items() if version >= step or version == 0
        }


class Watched(Environment):
    """An environment that sets its index's age itself, and holds its rewards, and those of other settings,
    against full re-encoding."""

    # Set by the command; the trainer makes the environment by its class.
    setting: Setting
    others: Sequence[Setting] = ()
    measured_at: frozenset[int] = frozenset()
    lead: int = 0
    log: list[dict[str, Any]]

    def __init__(self, index: Any, encode_documents: EncodeDocuments, **options: Any):
        budget = round(SHARE_A_PERIOD * index.shape[0] / PERIOD)
        self._options = {**options, "overlay_max_age_steps": OVERLAY_MAX_AGE}
        super().__init__(
            index,
            encode_documents,
            **{**self._options, "refresh_budget": budget if self.setting.overlay else 0},
        )
        self._indexes = Indexes(index.ids, encode_documents)
        self._rows = probe_rows(index.shape[0], 1000)
        self._shadows = {
            other: Environment(
                index, encode_documents, **{**self._options, "refresh_budget": budget if other.overlay else 0}
            )
            for other in self.others
        }

    def score(
        self,
        step: int,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        **more: Any,
    ) -> StepResult:
        wanted = {
            s.version_at(t) for t in self.measured_at for s in (self.setting, *self.others) if t >= step
        }
        if step in wanted or step == 0 or (self.setting.period and step % self.setting.period == 0):
            self._indexes.make(step)
        measured = step in self.measured_at
        if measured or self.setting.period == 0:
            self._indexes.make(step)
        version = self.setting.version_at(step)
        if version != self.index.version or step == 0:
            self.swap(self._indexes[version])
        result = super().score(step, positives, vectors, valid, **more)
        found = {self.setting: result}
        # Before it is measured, an overlay has to fill as it does in use.
        next_measured = min((t for t in self.measured_at if t - self.lead <= step <= t), default=None)
        for other, shadow in self._shadows.items():
            if next_measured is None or (version := other.version_at(next_measured)) > step:
                continue
            if version != shadow.index.version:
                shadow.swap(self._indexes[version])
            found[other] = shadow.score(step, positives, vectors, valid, **more)
        if measured:
            current = self._indexes[step]
            truth = Environment(
                current, lambda rows: current.take(rows), **{**self._options, "refresh_budget": 0}
            )
            rewards = truth.score(step, positives, vectors, valid, **more).rewards
            for setting, of_setting in found.items():
                drift = measure_drift(
                    self._indexes[setting.version_at(step)].take(self._rows), current.take(self._rows)
                )
                self.log.append(
                    {
                        "setting": setting.name,
                        "step": step,
                        "age": of_setting.stats["index_age"],
                        **agreement(of_setting.rewards, rewards),
                        "drift_cosine": drift.cosine,
                        "drift_overlap": drift.overlap,
                        "reencoded_share": of_setting.stats["reencoded_share"],
                        "reencoded_period_share": of_setting.stats["reencoded_period_share"],
                    }
                )
        self._indexes.forget_before(
            min((s.version_at(step) for s in (self.setting, *self.others)), default=step)
        )
        return result


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the measured steps of one setting; the least τ too."""
    names = (
        "age",
        "tau",
        "tau_within_groups",
        "mean_difference",
        "drift_cosine",
        "drift_overlap",
        "reencoded_share",
    )
    means = {name: round(float(np.nanmean([line[name] for line in lines])), 4) for name in names}
    return {**means, "tau_least": round(min(line["tau"] for line in lines), 4), "measured": len(lines)}


def watch(
    setting: Setting, *, others: Sequence[Setting] = (), measured_at: Sequence[int], lead: int = 0
) -> list[dict[str, Any]]:
    """Let the trainer make its environment so; returns the list that what is measured goes to."""
    log: list[dict[str, Any]] = []
    Watched.setting, Watched.others, Watched.measured_at, Watched.lead, Watched.log = (
        setting,
        others,
        frozenset(measured_at),
        lead,
        log,
    )
    live_index.Environment = Watched
    return log
