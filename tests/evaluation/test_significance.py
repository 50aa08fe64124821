"""Intervals and p-values: scipy on the same numbers, and every exchange counted one by one."""

import itertools

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test

from search_r3_jax.evaluation.significance import bootstrap_interval, sign_flip_p_value


def differences(count: int, shift: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 0.3, count)


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("count", [15, 400])
def test_the_interval_is_that_of_scipy(count: int, level: float) -> None:
    values = np.random.default_rng(count).beta(0.5, 0.8, count)
    ours = bootstrap_interval(values, samples=40_000, seed=1, level=level)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=40_000, confidence_level=level, method="percentile", rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)


def test_the_interval_of_two_values_is_exact() -> None:
    # Means of two draws from {0, 1}: 0 and 1 a quarter of the time each.
    found = bootstrap_interval(np.array([0.0, 1.0]), samples=5_000, seed=0)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = bootstrap_interval(np.array([0.0, 1.0]), samples=5_000, seed=0, level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_the_same_seed_gives_the_same_interval_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    values = differences(300, 0.1)
    whole = bootstrap_interval(values, samples=1000, seed=3)
    assert bootstrap_interval(values, samples=1000, seed=3) == whole
    assert bootstrap_interval(values, samples=1000, seed=4) != whole
    monkeypatch.setattr("search_r3_jax.evaluation.significance._VALUES_AT_ONCE", 7 * 300)
    in_portions = bootstrap_interval(values, samples=1000, seed=3)
    assert in_portions.low == pytest.approx(whole.low, abs=0.01)
    assert in_portions.high == pytest.approx(whole.high, abs=0.01)


@pytest.mark.parametrize(
    "values",
    [
        [0.3],
        [0.5, -0.1],
        [0.2, 0.2, 0.2],
        [0.1, -0.4, 0.0, 0.3, 0.25, -0.05],
        [0.1, 0.2, -0.3, 0.4, 0.0, 0.0],
    ],
)
def test_few_queries_are_counted_exactly(values: list[float]) -> None:
    observed = abs(sum(values))
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = np.mean([value >= observed - 1e-9 for value in flipped])
    assert sign_flip_p_value(np.array(values), samples=10_000, seed=0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [8, 12])
def test_the_exact_p_value_is_that_of_scipy(count: int) -> None:
    values = differences(count, 0.15, seed=count)
    theirs = permutation_test(
        (values, np.zeros(count)),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=1 << count,
    )
    assert sign_flip_p_value(values, samples=10_000, seed=0) == pytest.approx(float(theirs.pvalue), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.06])
def test_the_random_p_value_is_near_that_of_scipy(shift: float) -> None:
    values = differences(120, shift, seed=5)
    theirs = permutation_test(
        (values, np.zeros(120)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=1,
    )
    # Four standard errors of two such shares.
    p = float(theirs.pvalue)
    assert sign_flip_p_value(values, samples=20_000, seed=0) == pytest.approx(
        p, abs=4 * np.sqrt(2 * max(p, 0.001) / 20_000)
    )


def test_no_difference_has_p_1_and_a_clear_one_is_never_0() -> None:
    assert sign_flip_p_value(np.zeros(50), samples=100, seed=0) == 1.0
    assert sign_flip_p_value(np.full(200, 0.1), samples=999, seed=0) == 1 / 1000


@pytest.mark.parametrize("values", [np.array([]), np.array([[1.0]]), np.array([np.nan, 1.0])])
def test_values_that_mean_nothing_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="want"):
        bootstrap_interval(values, samples=10, seed=0)
    with pytest.raises(ValueError, match="want"):
        sign_flip_p_value(values, samples=10, seed=0)
