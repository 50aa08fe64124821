"""Tokens a second and model FLOPs utilisation of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.data.pipeline import TextChunks
from search_r3_jax.models.flops import head_flops, layers_flops, training_flops


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Counts the necessary work of a step: no padding, shared prefixes or recomputation.

    Attributes:
        peak: of all devices together, FLOP/s; None where it is not known.
        with_base: the frozen base reads the queries too, for the KL term.
    """

    model: ModelConfig
    lora: LoraConfig
    peak: float | None
    with_base: bool

    def of(self, queries: TextChunks, documents: TextChunks, seconds: float) -> dict[str, float]:
        """Throughput of a step: `tokens_per_second`, `tflops`, and `mfu` where the peak is known.

        `tflops` are model FLOPs a second in 10¹²; `mfu` is their share of the peak, in [0, 1].
        """
        tokens, attended = 0, 0
        for chunks in (queries, documents):
            real = chunks.segments >= 0
            tokens += int(real.sum())
            attended += int(np.sum(chunks.positions[real].astype(np.int64) + 1))
        read = int((queries.reply_at >= 0).sum())
        flops = training_flops(self.model, self.lora, tokens, attended, read)
        if self.with_base:
            real = queries.segments >= 0
            flops += layers_flops(
                self.model, int(real.sum()), int(np.sum(queries.positions[real].astype(np.int64) + 1))
            )
            flops += head_flops(self.model, read)
        found = {"tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12}
        return found if self.peak is None else found | {"mfu": flops / seconds / self.peak}
