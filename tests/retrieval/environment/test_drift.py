"""Drift of a probe, against loops over its definition."""

import numpy as np
import pytest

from search_r3_jax.retrieval.environment.drift import measure_drift, probe_rows


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_nothing_moved_or_everything() -> None:
    vectors = unit((40, 8), 0)
    still = measure_drift(vectors, vectors)
    assert (still.cosine, still.overlap) == (pytest.approx(1), 1)
    # Turned as a whole: every vector is elsewhere, every neighbourhood the same.
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0].astype(np.float32)
    turned = measure_drift(vectors, vectors @ turn)
    assert turned.overlap == 1
    assert turned.cosine < 0.9


@pytest.mark.parametrize("count", [2, 7, 40])
def test_equals_loops(count: int) -> None:
    then, now = unit((count, 8), 0), unit((count, 8), 1)
    k = min(10, count - 1)
    shared = []
    for row in range(count):
        others = [other for other in range(count) if other != row]
        before = sorted(others, key=lambda other: -float(then[row].astype(float) @ then[other]))[:k]
        after = sorted(others, key=lambda other: -float(now[row].astype(float) @ now[other]))[:k]
        shared.append(len(set(before) & set(after)) / k)
    drift = measure_drift(then, now)
    assert drift.overlap == pytest.approx(np.mean(shared))
    assert drift.cosine == pytest.approx(
        np.mean([a.astype(float) @ b for a, b in zip(then, now, strict=True)]), abs=1e-6
    )


def test_the_probe_is_spread_and_fixed() -> None:
    rows = probe_rows(5000, 1000)
    assert (len(rows), rows[0], rows[-1], rows.dtype) == (1000, 0, 4999, np.int32)
    assert np.diff(rows).max() <= 6
    np.testing.assert_array_equal(rows, probe_rows(5000, 1000))
    np.testing.assert_array_equal(probe_rows(7, 1000), np.arange(7))


def test_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="want two"):
        measure_drift(unit((5, 8), 0), unit((6, 8), 0))
