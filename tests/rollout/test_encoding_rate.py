"""Tokens and operations of encoding, counted from rows by hand."""

from __future__ import annotations

import time

import jax
import pytest
from helpers.tiny_models import CONFIG

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.rollout.encoding_rate import EncodingRate, rate_text


def test_work_by_hand() -> None:
    rate = EncodingRate(CONFIG, chips=4, peak=4e9)
    assert rate.scalars() == {}
    assert rate_text(rate.scalars()) == ""
    for rows in ([[1] * 5, [1] * 3], [[1] * 9]):
        with rate.counting(rows, 10):
            time.sleep(0.01)
    tokens, attended = 17, sum(10 + i for n in (5, 3, 9) for i in range(1, n + 1))
    D, F, N, K, H, L = 48, 64, 4, 2, 16, 2
    weights = 2 * D * N * H + 2 * D * K * H + 3 * D * F
    flops = L * (2 * weights * tokens + 4 * N * H * attended)
    found = rate.scalars()
    assert rate.seconds >= 0.02
    assert found["tokens_per_second"] == pytest.approx(tokens / rate.seconds)
    assert found["tokens_per_second_per_chip"] == pytest.approx(tokens / rate.seconds / 4)
    assert found["mfu"] == pytest.approx(flops / rate.seconds / 4e9)
    assert rate_text({"tokens_per_second_per_chip": 8123.4, "mfu": 0.314}) == "8,123 tokens/s a chip, MFU 31%"


def test_compiling_does_not_count_and_no_share_of_an_unknown_peak_is_told() -> None:
    rate = EncodingRate(CONFIG, chips=1, peak=None)
    before, started = compile_seconds(), time.perf_counter()
    with rate.counting([[1] * 8], 0):
        jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(7)).block_until_ready()
    whole, compiled = time.perf_counter() - started, compile_seconds() - before
    assert compiled > 0
    assert rate.seconds <= whole - compiled + 0.001
    assert set(rate.scalars()) == {"tokens_per_second", "tokens_per_second_per_chip"}
