"""Progress of stage 2: the counters that a checkpoint keeps as JSON beside parameters and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_r3_jax.config import RlConfig
from search_r3_jax.training.index_state import IndexStatistics


@dataclass(kw_only=True)
class RlProgress:
    """Counters of a run of stage 2.

    Attributes:
        step: steps taken.
        index: version in use, swaps and versions used so far.
        reencoded: documents re-encoded in all steps.
        valid_rates: valid rate of each step.
        skipped: steps skipped because they were not finite.
        skipped_in_a_row: updates skipped in a row up to now.
        guard: state of the `CollapseGuard`.
    """

    step: int = 0
    index: IndexStatistics = field(default_factory=IndexStatistics)
    reencoded: int = 0
    valid_rates: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    guard: dict[str, int] = field(default_factory=lambda: {"valid_low": 0, "entropy_low": 0})

    def finished(self, rl: RlConfig) -> bool:
        """Whether all steps are taken, those for `rl.min_swaps` included."""
        if self.step < rl.steps:
            return False
        return len(self.index.swaps) >= rl.min_swaps or self.step >= rl.steps + rl.max_extra_steps

    def recent_valid_rate(self) -> float:
        """Mean valid rate of the last quarter of the steps."""
        return float(np.mean(self.valid_rates[-max(1, len(self.valid_rates) // 4) :]))

    def to_meta(self) -> dict[str, Any]:
        """The counters as a checkpoint keeps them; `step` is left out, being the checkpoint's."""
        return {
            **self.index.to_json(),
            "reencoded": self.reencoded,
            "valid": list(self.valid_rates),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "guard": dict(self.guard),
        }

    @classmethod
    def from_meta(cls, step: int, meta: Mapping[str, Any]) -> RlProgress:
        """The inverse of `to_meta`."""
        return cls(
            step=step,
            index=IndexStatistics.from_json(meta),
            reencoded=meta["reencoded"],
            valid_rates=list(meta["valid"]),
            skipped=meta["skipped"],
            skipped_in_a_row=meta["skipped_in_a_row"],
            guard=dict(meta["guard"]),
        )
