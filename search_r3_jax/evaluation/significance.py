"""Paired tests over queries: bootstrap intervals and a permutation test, in plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
# Resampled values held at a time.
_VALUES_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values_q: np.ndarray, *, samples: int, seed: int, level: float = LEVEL) -> Interval:
    """The mean of `values_q` [Q] with its percentile bootstrap interval (Efron 1979) over queries.

    The interval of a paired difference is the interval of the differences. Raises ValueError without values
    or samples.
    """
    values_q = _checked(values_q, samples)
    generator = np.random.default_rng(seed)
    Q = len(values_q)
    means = [values_q[generator.integers(Q, size=(count, Q))].mean(axis=1) for count in _portions(samples, Q)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(mean=float(values_q.mean()), low=low, high=high)


def sign_flip_p_value(differences_q: np.ndarray, *, samples: int, seed: int) -> float:
    """Two-sided p-value of a paired permutation test of mean 0.

    Under the null hypothesis a query's two values may be exchanged. All 2^Q exchanges are counted if there
    are at most `samples`; otherwise `samples` random ones and the observed one (Phipson & Smyth 2010), so
    that p is never 0. Raises ValueError without differences or samples.
    """
    # Equal queries change no sum.
    differences_q = _checked(differences_q, samples)
    differences_q = differences_q[differences_q != 0]
    Q = len(differences_q)
    if Q == 0:
        return 1.0
    # Sums of the same numbers in another order differ by about this much.
    least = abs(differences_q.sum()) - 1e-12 * np.abs(differences_q).sum()
    if Q < 63 and samples >= 1 << Q:
        bits_sq = (np.arange(1 << Q, dtype=np.int64)[:, None] >> np.arange(Q)) & 1
        return float(np.mean(np.abs((1 - 2 * bits_sq) @ differences_q) >= least))
    generator = np.random.default_rng(seed)
    as_extreme = 0
    for count in _portions(samples, Q):
        signs_sq = 1 - 2 * generator.integers(2, size=(count, Q), dtype=np.int8)
        as_extreme += int(np.sum(np.abs(signs_sq @ differences_q) >= least))
    return (as_extreme + 1) / (samples + 1)


def _checked(values_q: np.ndarray, samples: int) -> np.ndarray:
    values_q = np.asarray(values_q, np.float64)
    if values_q.ndim != 1 or not len(values_q) or not np.isfinite(values_q).all() or samples < 1:
        raise ValueError(
            f"values {values_q.shape}, samples {samples}: want [Q] finite, Q ≥ 1, and at least one sample"
        )
    return values_q


def _portions(samples: int, Q: int) -> list[int]:
    """`samples` split into portions whose values fit in memory."""
    portion = max(1, _VALUES_AT_ONCE // Q)
    return [min(portion, samples - start) for start in range(0, samples, portion)]
