"""The range of every numeric setting, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from search_r3_jax.config.run import RunConfig
from search_r3_jax.errors import UserError

# Of float32, in which programs compute, with room for squares and quotients.
_LEAST, _MOST = 1e-30, 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high` that float32 can hold; an end that is `open` is left out."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is a finite number of the range."""
        # What is 0 in float32 is not above 0.
        above = value > max(self.low, _LEAST) if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return abs(value) <= _MOST and above and below

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g}"
        if self.high == math.inf:
            return f"a finite number {low}" if self.low_open else f"a finite number, {low} or more"
        return f"a number from {low} to {'below ' if self.high_open else ''}{self.high:g}"


_ANY, _SOME, _ABOVE_0 = Range(low=0), Range(low=1), Range(low=0, low_open=True)
_SHARE, _COSINE, _DECAY = Range(low=0, high=1), Range(low=-1, high=1), Range(low=0, high=1, high_open=True)
_AXIS = Range(low=-1)
# Similarities and logits are divided by it; below, gradients overflow.
_TEMPERATURE = Range(low=1e-6)

_OPTIMIZER = {
    **dict.fromkeys(("learning_rate", "row_scale", "warmup_steps", "weight_decay", "clip_norm"), _ANY),
    **{"final_share": _SHARE, "b1": _DECAY, "b2": _DECAY},
}
_MESH = {name: _AXIS for name in ("slice", "data", "fsdp", "tensor", "sequence")}
_SECTIONS: dict[str, dict[str, Range]] = {
    "": {"seed": _ANY, "start_step": _ANY},
    "data": {
        **{"weights": _ABOVE_0, "dev_documents": _SOME},
        **dict.fromkeys(("dev_queries", "rl_queries", "rl_documents"), _ANY),
    },
    "data.functions": dict.fromkeys(("train", "dev", "test", "test_queries"), _ANY),
    "text": dict.fromkeys(("max_query_tokens", "max_document_tokens", "max_thought_tokens"), _SOME),
    "lora": {"rank": _ANY, "alpha": _ABOVE_0, "dropout": _DECAY},
    "sft": {
        **dict.fromkeys(("steps", "global_batch", "matryoshka", "key_terms"), _SOME),
        **dict.fromkeys(("save_every", "keep", "max_skipped"), _SOME),
        **dict.fromkeys(("encode_chunk", "negatives", "eval_every", "keep_every"), _ANY),
        **dict.fromkeys(("infonce_weight", "triplet_weight", "language_weight", "kl_weight"), _ANY),
        **{"temperature": _TEMPERATURE, "reasoned_share": _SHARE},
        **{"false_negative_margin": Range(low=-2, high=2), "triplet_margin": Range(low=0, high=2)},
    },
    "sft.optimizer": _OPTIMIZER,
    "rl": {
        **dict.fromkeys(("steps", "global_queries", "inner_epochs", "save_every", "keep"), _SOME),
        **dict.fromkeys(("sample_every", "max_skipped"), _SOME),
        **dict.fromkeys(("micro_queries", "min_tokens", "clip_high", "beta", "importance_cap"), _ANY),
        **dict.fromkeys(("eval_every", "keep_every", "min_swaps", "max_extra_steps"), _ANY),
        # A group of one has no advantage: its reward is its own mean.
        **{"group_size": Range(low=2), "clip_low": _SHARE, "off_policy_steps": Range(low=0, high=1)},
    },
    "rl.sampler": {
        # The trainer divides the logits by the temperature.
        **{"temperature": _TEMPERATURE, "max_think_tokens": _SOME, "top_k": _ANY, "prefill_chunk": _ANY},
        "slots": _ANY,
        **{"top_p": Range(low=0, high=1, low_open=True)},
    },
    "rl.reward": {
        **{"temperature": _TEMPERATURE, "margin_weight": _SHARE, "margin_width": _ABOVE_0},
        **{"hard_negatives": _SOME, "length_weight": _ANY, "free_tokens": _ANY},
        **{"floor_gap": Range(low=0, high=1, low_open=True, high_open=True)},
    },
    "rl.infonce": {
        **{"weight": _ANY, "temperature": _TEMPERATURE, "negatives": _ANY, "near_duplicate_cosine": _COSINE}
    },
    "rl.collapse": {"steps": _ANY, "valid_rate": _SHARE, "entropy": _ANY},
    "rl.optimizer": _OPTIMIZER,
    "index": {
        **dict.fromkeys(("candidates", "documents_per_step", "keep_versions", "parts"), _SOME),
        # Two documents have a nearest one each.
        "drift_documents": Range(low=2),
        **dict.fromkeys(("neighbours", "refresh_budget", "overlay_max_age_steps", "drift_every"), _ANY),
        **dict.fromkeys(("max_index_age_steps", "threads", "cores"), _ANY),
        **{"drift_cosine": _COSINE, "drift_overlap": _SHARE, "recall_gate": _SHARE},
        **{"silent_seconds": _ABOVE_0, "nice": Range(low=0, high=19)},
    },
    "index.mesh": _MESH,
    "mesh": _MESH,
}
RANGES = {
    f"{section}.{name}".removeprefix("."): limits
    for section, fields in _SECTIONS.items()
    for name, limits in fields.items()
}
"""Path of each numeric setting → its range; that of a list holds for each of its numbers."""


def check_ranges(config: RunConfig, stage: Literal["sft", "rl"]) -> None:
    """Raise UserError for the first setting of a stage that is out of range, NaN or infinite."""
    check_numbers(
        dataclasses.asdict(config), "", leave_out=("rl.", "index.") if stage == "sft" else ("sft.",)
    )
    if stage == "rl" and config.rl.sampler.top_k == 1:
        raise UserError(
            "rl.sampler.top_k: 1: all replies of a query would be the same; give 0 (off), or 2 or more"
        )
    sft = config.sft
    if stage == "sft" and not any(
        (sft.infonce_weight, sft.triplet_weight, sft.language_weight, sft.kl_weight)
    ):
        raise UserError("sft.infonce_weight: 0: every loss has weight 0; give one of them more")


def check_numbers(fields: dict[str, Any], prefix: str, *, leave_out: tuple[str, ...] = ()) -> None:
    """Raise UserError for the first number out of its range; `prefix` ends in a dot."""
    for path, values in _numbers(fields, prefix):
        if leave_out and path.startswith(leave_out):
            continue
        for value in values:
            if not RANGES[path].holds(value):
                raise UserError(f"{path}: {value}: give {RANGES[path]}")


def _numbers(fields: dict[str, Any], prefix: str) -> Iterator[tuple[str, Sequence[float]]]:
    """Path and numbers of every setting that has some."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        # bool is a kind of int in Python.
        numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
        if numbers:
            yield f"{prefix}{name}", numbers
