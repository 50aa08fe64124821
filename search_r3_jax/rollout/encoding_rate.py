"""Tokens a second and model FLOPs utilisation of encoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.config import ModelConfig
from search_r3_jax.models.flops import layers_flops


class EncodingRate:
    """Counts the necessary work of encoding: no padding, no shared prefix, no compiling.

    Attributes:
        tokens: encoded so far.
        seconds: that took, without compiling.
    """

    def __init__(self, model: ModelConfig, *, chips: int, peak: float | None):
        """Of `chips` devices whose `peak` together is in FLOP/s; None where none is published."""
        self._model, self._chips, self._peak = model, chips, peak
        self.tokens, self.seconds, self._flops = 0, 0.0, 0.0

    @contextmanager
    def counting(self, rows: Sequence[Sequence[int]], prefix: int) -> Iterator[None]:
        """Count the work within: token rows behind a shared prefix of that many tokens."""
        started, compiling = time.perf_counter(), compile_seconds()
        yield
        self.seconds += time.perf_counter() - started - (compile_seconds() - compiling)
        lengths = [len(row) for row in rows]
        attended = sum(length * prefix + length * (length + 1) // 2 for length in lengths)
        self.tokens += sum(lengths)
        self._flops += layers_flops(self._model, sum(lengths), attended)

    def scalars(self) -> dict[str, float]:
        """`tokens_per_second`, `tokens_per_second_per_chip`, and `mfu` in [0, 1] where the peak is known.

        Empty before anything was encoded.
        """
        if self.seconds <= 0 or self.tokens == 0:
            return {}
        rate = self.tokens / self.seconds
        found = {"tokens_per_second": rate, "tokens_per_second_per_chip": rate / self._chips}
        return found if self._peak is None else found | {"mfu": self._flops / self.seconds / self._peak}


def rate_text(scalars: dict[str, float]) -> str:
    """`8,123 tokens/s a chip, MFU 31%`; nothing of no work."""
    if not scalars:
        return ""
    text = f"{scalars['tokens_per_second_per_chip']:,.0f} tokens/s a chip"
    return f"{text}, MFU {scalars['mfu']:.0%}" if "mfu" in scalars else text
