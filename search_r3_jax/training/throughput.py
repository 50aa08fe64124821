"""Tokens a second and model FLOPs utilisation of a training step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.chips import chip_of
from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.data.pipeline import TextChunks
from search_r3_jax.models.flops import head_flops, layers_flops, training_flops

PROBE_SIZE = 1536


def peak_flops() -> float:
    """Peak of all devices together, FLOP/s.

    Published for a TPU; elsewhere measured now, by a float32 matrix product.
    """
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        return chip.flops * jax.device_count()
    matrix = jnp.ones((PROBE_SIZE, PROBE_SIZE), jnp.float32)
    product = jax.jit(jnp.dot)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2.0 * PROBE_SIZE**3 / min(seconds)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Counts the necessary work of a step: no padding, shared prefixes or recomputation.

    Attributes:
        peak: of all devices together, FLOP/s.
        with_base: the frozen base reads the queries too, for the KL term.
    """

    model: ModelConfig
    lora: LoraConfig
    peak: float
    with_base: bool

    def of(self, queries: TextChunks, documents: TextChunks, seconds: float) -> dict[str, float]:
        """Throughput of a step: `tokens_per_second`, `tflops` and `mfu`.

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
        return {
            "tokens_per_second": tokens / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak,
        }
