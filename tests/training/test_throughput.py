"""Tokens, operations and their share of the peak, counted from texts by hand."""

import jax
import numpy as np
import pytest
from helpers.tiny_models import CONFIG

from search_r3_jax.chips import peak_flops
from search_r3_jax.config import LoraConfig
from search_r3_jax.data.pipeline import TextChunks
from search_r3_jax.training.throughput import Throughput


def chunks(lengths: list[int], start: int, read: int) -> TextChunks:
    """One row of 32 with texts of these lengths, all behind a prefix of `start` tokens."""
    positions, segments = np.full((1, 1, 32), -1), np.full((1, 1, 32), -1)
    at = 0
    for i, length in enumerate(lengths):
        positions[0, 0, at : at + length] = start + np.arange(length)
        segments[0, 0, at : at + length] = i
        at += length
    reply_at = np.array([[*range(read), -1]])
    return TextChunks(
        np.zeros((1, 1, 32), int),
        positions,
        segments,
        segments * 0,
        np.zeros((1, len(lengths)), int),
        reply_at,
    )


def test_work_by_hand() -> None:
    lora = LoraConfig(rank=0)
    found = Throughput(model=CONFIG, lora=lora, peak=1e9, with_base=False).of(
        chunks([5, 3], 10, 4), chunks([9], 10, 0), 2.0
    )
    tokens, attended = 5 + 3 + 9, sum(10 + i for n in (5, 3, 9) for i in range(1, n + 1))
    D, F, N, K, H, L, V = 48, 64, 4, 2, 16, 2, 320
    weights = 2 * D * N * H + 2 * D * K * H + 3 * D * F
    forward = L * (2 * weights * tokens + 4 * N * H * attended) + 2 * D * V * 4
    assert found["tokens_per_second"] == tokens / 2
    assert found["tflops"] == pytest.approx(3 * forward / 2 / 1e12)
    assert found["mfu"] == pytest.approx(3 * forward / 2 / 1e9)


def test_the_base_reads_the_queries_alone() -> None:
    lora = LoraConfig(rank=4)
    queries, documents = chunks([5, 3], 10, 4), chunks([9], 10, 0)
    without, with_base = (
        Throughput(model=CONFIG, lora=lora, peak=1.0, with_base=base).of(queries, documents, 1.0)
        for base in (False, True)
    )
    queries_alone = Throughput(model=CONFIG, lora=LoraConfig(rank=0), peak=1.0, with_base=False).of(
        queries, chunks([], 0, 0), 1.0
    )
    assert with_base["mfu"] - without["mfu"] == pytest.approx(queries_alone["mfu"] / 3)


def test_of_a_device_without_a_published_peak_no_share_is_told() -> None:
    # What a matrix product reaches on a CPU says how busy the machine was just then.
    assert peak_flops(jax.devices()) is None
    found = Throughput(model=CONFIG, lora=LoraConfig(rank=0), peak=None, with_base=False).of(
        chunks([5], 0, 1), chunks([9], 0, 0), 1.0
    )
    assert found.keys() == {"tokens_per_second", "tflops"}
