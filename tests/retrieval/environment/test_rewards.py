"""Rewards against an nDCG written out by hand in float64."""

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3_jax.config import RewardConfig, RewardVariant
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.environment.rewards import (
    check_candidates,
    check_reward,
    constant_terms,
    dcg_reward,
    log_rank_reward,
    rank_and_margin,
    reward_terms,
    total_reward,
    within_group_variance,
)


def hard_ndcg(scores: list[float], grades: list[float]) -> float:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    gained = sum(grades[place] / math.log2(rank + 2) for rank, place in enumerate(order))
    return gained / sum(
        grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(grades, reverse=True))
    )


@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [2, 0, 1, 0, 3, 0]])
def test_cold_limit_is_hard_ndcg(grades: list[float]) -> None:
    similarities = np.random.default_rng(0).uniform(-1, 1, size=(40, 6))
    expected = [hard_ndcg(row.tolist(), grades) for row in similarities]
    np.testing.assert_allclose(
        dcg_reward(similarities, np.array(grades), temperature=1e-9), expected, atol=1e-12
    )


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
    rewards = total_reward(
        reward_terms(similarities, relevance, np.array([True, False, False]), RewardConfig())
    )
    assert rewards.dtype == np.float32
    assert rewards[0] >= 0.1
    np.testing.assert_array_equal(rewards[1:], 0.0)


def test_valid_rewards_are_mapped_above_the_gap() -> None:
    similarities = np.random.default_rng(0).uniform(size=(4, 9))
    relevance = np.eye(9)[0]
    raw = dcg_reward(similarities, relevance)
    rewards = total_reward(
        reward_terms(similarities, relevance, np.ones(4, bool), RewardConfig(floor_gap=0.25))
    )
    np.testing.assert_allclose(rewards, 0.25 + 0.75 * raw, rtol=1e-6)


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


@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [2, 0, 1, 0, 3, 0]])
def test_cold_limit_is_pytrec_evals_ndcg(grades: list[int]) -> None:
    similarities = np.random.default_rng(5).uniform(-1, 1, size=(20, 6))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {"q": {f"d{c}": grade for c, grade in enumerate(grades)}}, {"ndcg"}
    )
    expected = [
        evaluator.evaluate({"q": {f"d{c}": float(s) for c, s in enumerate(row)}})["q"]["ndcg"]
        for row in similarities
    ]
    np.testing.assert_allclose(
        dcg_reward(similarities, np.array(grades), temperature=1e-9), expected, atol=1e-9
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def brute_force_log_rank(scores: list[float], grades: list[float], temperature: float) -> float:
    best = max(score for score, grade in zip(scores, grades, strict=True) if grade > 0)
    negatives = [score for score, grade in zip(scores, grades, strict=True) if grade == 0]
    rank = 1 + sum(sigmoid((score - best) / temperature) for score in negatives)
    return 1 - math.log(rank) / math.log(1 + len(negatives))


def brute_force_rank_and_margin(
    scores: list[float], grades: list[float], temperature: float, width: float, k: int
) -> tuple[float, float]:
    positives = [score for score, grade in zip(scores, grades, strict=True) if grade > 0]
    negatives = sorted(
        (score for score, grade in zip(scores, grades, strict=True) if grade == 0), reverse=True
    )
    rank = sum(1 / (1 + sum(sigmoid((n - p) / temperature) for n in negatives)) for p in positives) / len(
        positives
    )
    hard = negatives[:k]
    margin = sum(positives) / len(positives) - sum(hard) / len(hard)
    return rank, min(1.0, max(0.0, 0.5 + margin / (2 * width)))


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("grades", [[1, 0, 0, 0, 0, 0, 0], [0, 2, 0, 1, 0, 0, 1]])
def test_variants_equal_loops_in_float64(grades: list[float], temperature: float) -> None:
    similarities = np.random.default_rng(3).uniform(-1, 1, size=(30, 7))
    log_rank = [brute_force_log_rank(row.tolist(), grades, temperature) for row in similarities]
    np.testing.assert_allclose(
        log_rank_reward(similarities, np.array(grades), temperature=temperature), log_rank, atol=1e-12
    )
    parts = [brute_force_rank_and_margin(row.tolist(), grades, temperature, 0.8, 3) for row in similarities]
    rank, margin = rank_and_margin(
        similarities, np.array(grades), temperature=temperature, margin_width=0.8, hard_negatives=3
    )
    np.testing.assert_allclose(np.stack([rank, margin], axis=1), parts, atol=1e-12)


def test_log_rank_spans_the_whole_range() -> None:
    similarities = np.array([[0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
    rewards = log_rank_reward(similarities, np.array([1, 0, 0, 0]), temperature=1e-9)
    np.testing.assert_allclose(rewards, [1, 1 - math.log(4) / math.log(4), 0], atol=1e-12)
    two_ahead = log_rank_reward(np.array([[0.25, 0.1, 0.3, 0.4]]), np.array([1, 0, 0, 0]), temperature=1e-9)
    np.testing.assert_allclose(two_ahead, [1 - math.log(3) / math.log(4)], atol=1e-12)
    np.testing.assert_array_equal(log_rank_reward(similarities, np.ones(4)), 1.0)
    np.testing.assert_array_equal(rank_and_margin(similarities, np.ones(4)), 1.0)


VARIANTS: list[RewardVariant] = ["dcg", "log_rank", "rank_margin", "gain_over_direct"]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(1e-9, 0.5),
    raised=st.floats(0, 1),
    positives=st.integers(1, 4),
)
def test_a_better_rank_never_earns_less(
    variant: RewardVariant, seed: int, temperature: float, raised: float, positives: int
) -> None:
    """Raising a positive, or lowering a negative, with all else as it was; and all stays in floor_gap … 1."""
    generator = np.random.default_rng(seed)
    scores, direct = generator.uniform(-1, 1, size=(2, 9))
    grades = (np.arange(9) < positives).astype(float)
    better, lower = scores.copy(), scores.copy()
    better[generator.integers(positives)] += raised
    lower[generator.integers(positives, 9)] -= raised
    setting = RewardConfig(variant=variant, temperature=temperature)
    terms = reward_terms(
        np.stack([scores, better, lower]), grades, np.ones(3, bool), setting, direct_similarities=direct
    )
    total = sum(terms.values(), np.zeros(3))
    assert total[1] >= total[0] - 1e-12
    assert total[2] >= total[0] - 1e-12
    assert (total >= 0.1 - 1e-12).all()
    assert (total <= 1 + 1e-12).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_two_hard_ranks_the_better_never_earns_less(variant: RewardVariant) -> None:
    similarities = np.tile(np.linspace(-0.9, 0.9, 21)[None], (22, 1))
    similarities[:, 0] = np.linspace(-0.99, 0.99, 22)
    setting = RewardConfig(variant=variant, temperature=1e-9)
    rewards = total_reward(
        reward_terms(
            similarities, np.eye(21)[0], np.ones(22, bool), setting, direct_similarities=similarities[9]
        )
    )
    ranks = (similarities[:, 1:] > similarities[:, :1]).sum(axis=1)
    assert (np.diff(ranks) <= 0).all()
    assert (np.diff(rewards) >= 0).all()
    assert rewards[-1] > rewards[0]


def test_no_gain_over_the_direct_embedding_is_one_half() -> None:
    similarities = np.random.default_rng(0).uniform(-1, 1, size=(4, 6))
    relevance = np.eye(6)[2]
    setting = RewardConfig(variant="gain_over_direct", floor_gap=0.2)
    rewards = total_reward(
        reward_terms(similarities, relevance, np.ones(4, bool), setting, direct_similarities=similarities[1])
    )
    raw = dcg_reward(similarities, relevance)
    np.testing.assert_allclose(rewards, 0.2 + 0.8 * (0.5 + (raw - raw[1]) / 2), rtol=1e-6)
    np.testing.assert_allclose(rewards[1], 0.6, rtol=1e-6)


def test_length_costs_along_a_line_beyond_what_is_free_and_never_reaches_the_floor() -> None:
    similarities = np.tile([[-1.0, 1.0, 0.5]], (6, 1))
    tokens = np.array([0, 10, 15, 20, 30, 30])
    valid = np.array([True] * 5 + [False])
    setting = RewardConfig(
        length_weight=0.25, free_tokens=10, floor_gap=0.1, variant="log_rank", temperature=1e-9
    )
    terms = reward_terms(similarities, np.eye(3)[0], valid, setting, tokens=tokens, max_tokens=30)
    np.testing.assert_allclose(terms["length"], -0.9 * 0.2 * np.array([0, 0, 0.25, 0.5, 1, 0]), atol=1e-12)
    np.testing.assert_allclose(total_reward(terms), [0.28, 0.28, 0.235, 0.19, 0.1, 0], atol=1e-6)
    best = reward_terms(-similarities, np.eye(3)[0], valid, setting, tokens=tokens, max_tokens=30)
    np.testing.assert_allclose(total_reward(best)[[0, 4]], [1, 0.82], atol=1e-6)


def test_terms_are_what_the_reward_is_made_of() -> None:
    similarities = np.random.default_rng(0).uniform(-1, 1, size=(5, 8))
    setting = RewardConfig(variant="rank_margin", margin_weight=0.3, length_weight=0.1)
    valid = np.array([True, True, False, True, True])
    terms = reward_terms(similarities, np.eye(8)[1], valid, setting, tokens=np.arange(5), max_tokens=40)
    assert set(terms) == {"rank", "margin", "length", "format"}
    rank, margin = rank_and_margin(similarities, np.eye(8)[1])
    value = (0.7 * rank + 0.3 * margin + 0.1 * (1 - np.arange(5) / 40)) / 1.1
    np.testing.assert_allclose(total_reward(terms), np.where(valid, 0.1 + 0.9 * value, 0), rtol=1e-6)


def test_a_term_that_is_constant_in_every_group_is_named() -> None:
    group = np.array([7, 3, 7, 3, 3, 9])
    terms = {
        "constant": np.array([0.1, 0.7, 0.1, 0.7, 0.7, 0.3]),
        "tiny": np.array([0.1, 0.7, 0.1, 0.7, 0.7 + 1e-7, 0.3]),
        "varied": np.array([0.0, 1.0, 1.0, 2.0, 6.0, 5.0]),
    }
    variances = within_group_variance(terms, group)
    assert constant_terms(variances) == ["constant"]
    np.testing.assert_allclose(variances["varied"], (np.var([0, 1]) + np.var([1, 2, 6]) + 0) / 3, rtol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"floor_gap": 0.0},
        {"floor_gap": 1.0},
        {"variant": "nonsense"},
        {"margin_weight": 1.5},
        {"margin_width": 0.0},
        {"hard_negatives": 0},
        {"length_weight": -1.0},
        {"length_weight": 0.1, "free_tokens": 5, "max_tokens": 5},
    ],
)
def test_refuses_nonsense(wrong: dict) -> None:
    max_tokens = wrong.pop("max_tokens", 9)
    with pytest.raises(UserError, match=rf"rl\.reward\.{next(iter(wrong))}: "):
        check_reward(RewardConfig(**wrong), max_tokens=max_tokens)


def test_refuses_what_cannot_be_rewarded() -> None:
    similarities, one = np.zeros((2, 3)), np.array([1.0, 0, 0])
    broken = similarities.copy()
    broken[1, 2] = np.nan
    valid = np.ones(2, bool)
    with pytest.raises(ValueError, match=r"completion 1 are not finite \(1 of 2"):
        reward_terms(broken, one, valid, RewardConfig())
    with pytest.raises(ValueError, match="positives"):
        reward_terms(similarities, np.zeros(3), valid, RewardConfig())
    with pytest.raises(ValueError, match="direct"):
        reward_terms(similarities, one, valid, RewardConfig(variant="gain_over_direct"))
    with pytest.raises(ValueError, match="not finite"):
        reward_terms(
            similarities,
            one,
            valid,
            RewardConfig(variant="gain_over_direct"),
            direct_similarities=broken[1],
        )
    with pytest.raises(ValueError, match="tokens"):
        reward_terms(similarities, one, valid, RewardConfig(length_weight=0.1), max_tokens=9)
    with pytest.raises(ValueError, match="terms: length"):
        total_reward({"format": np.ones(2), "length": np.array([0.0, np.nan])})


def test_impossible_sizes_are_refused_in_one_line() -> None:
    check_candidates(documents=100, candidates=100)
    with pytest.raises(UserError, match=r"index\.candidates: 101") as error:
        check_candidates(documents=100, candidates=101)
    assert "\n" not in str(error.value)
