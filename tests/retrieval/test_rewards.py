"""Rewards against an nDCG written out by hand in float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3_jax.retrieval.rewards import dcg_reward, reward_group


def hard_ndcg(scores: list[float], grades: list[float]) -> float:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    gained = sum(grades[place] / math.log2(rank + 2) for rank, place in enumerate(order))
    return gained / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(grades, reverse=True)))


@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [2, 0, 1, 0, 3, 0]])
def test_cold_limit_is_hard_ndcg(grades: list[float]) -> None:
    similarities = np.random.default_rng(0).uniform(-1, 1, size=(40, 6))
    expected = [hard_ndcg(row.tolist(), grades) for row in similarities]
    np.testing.assert_allclose(dcg_reward(similarities, np.array(grades), temperature=1e-9), expected, atol=1e-12)


def test_soft_rank_by_hand() -> None:
    # The positive at 0.50, others at 0.52 and 0.40: rank 1 + σ(1) + σ(−5).
    rank = 1 + 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(5))
    reward = dcg_reward(np.array([[0.50, 0.52, 0.40]]), np.array([1, 0, 0]), temperature=0.02)
    np.testing.assert_allclose(reward, [1 / math.log2(1 + rank)], rtol=1e-12)


def test_two_equal_positives_on_top_earn_everything_however_close() -> None:
    for gap in (0.0, 0.001, 0.3):
        reward = dcg_reward(np.array([[0.9, 0.9 - gap, -0.9]]), np.array([1, 1, 0]))
        np.testing.assert_allclose(reward, [1.0], atol=1e-9)


def test_invalid_is_strictly_below_the_worst_valid() -> None:
    similarities = np.full((3, 2000), 1.0)
    similarities[:, 0] = -1.0
    similarities[2] = np.nan
    relevance = np.zeros(2000)
    relevance[0] = 1
    rewards = reward_group(similarities, relevance, np.array([True, False, False]))
    assert rewards.dtype == np.float32
    assert rewards[0] >= 0.1
    np.testing.assert_array_equal(rewards[1:], 0.0)


def test_valid_rewards_are_mapped_above_the_gap() -> None:
    similarities = np.random.default_rng(0).uniform(size=(4, 9))
    relevance = np.eye(9)[0]
    raw = dcg_reward(similarities, relevance)
    np.testing.assert_allclose(reward_group(similarities, relevance, np.ones(4, bool), floor_gap=0.25), 0.25 + 0.75 * raw, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(0, 2**31), st.floats(1e-3, 1))
def test_within_bounds_whatever_the_grades(scores: list[float], seed: int, temperature: float) -> None:
    grades = np.random.default_rng(seed).integers(0, 4, size=len(scores))
    grades[0] = 1
    reward = dcg_reward(np.array([scores]), grades, temperature=temperature)
    assert 0 < reward[0] <= 1 + 1e-12


def test_rises_with_the_similarity_of_the_positive() -> None:
    similarities = np.tile(np.random.default_rng(0).uniform(0.2, 0.8, size=8), (50, 1))
    similarities[:, 3] = np.linspace(0.1, 0.85, 50)
    rewards = dcg_reward(similarities, np.eye(8)[3])
    assert (np.diff(rewards) > 0).all()


@pytest.mark.parametrize(
    "wrong", [{"relevance": np.zeros(3)}, {"temperature": 0.0}, {"floor_gap": 0.0}, {"floor_gap": 1.0}, {"variant": "nonsense"}]
)
def test_refuses_nonsense(wrong: dict) -> None:
    arguments = {"similarities": np.zeros((1, 3)), "relevance": np.eye(3)[0], "valid": np.ones(1, bool), **wrong}
    with pytest.raises(ValueError, match=r"positives|temperature|floor_gap|variant"):
        reward_group(**arguments)
