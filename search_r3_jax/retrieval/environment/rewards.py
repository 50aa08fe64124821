"""Rewards of a group of completions from the similarities to its candidates; numpy, all in [0,1]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import get_args

import numpy as np

from search_r3_jax.config import RewardConfig, RewardVariant
from search_r3_jax.config.ranges import check_numbers
from search_r3_jax.errors import UserError


def check_reward(reward: RewardConfig, *, max_tokens: int) -> None:
    """Raise UserError for a setting out of range; `max_tokens` is the longest reply."""
    if reward.variant not in get_args(RewardVariant):
        raise UserError(f"rl.reward.variant: {reward.variant!r}: no such reward")
    check_numbers(dataclasses.asdict(reward), "rl.reward.")
    if reward.length_weight > 0 and reward.free_tokens >= max_tokens:
        raise UserError(
            f"rl.reward.length_weight: {reward.length_weight}, free_tokens {reward.free_tokens}: "
            f"want fewer free tokens than the {max_tokens} of a reply"
        )


def reward_terms(
    similarities: np.ndarray,
    relevance: np.ndarray,
    valid: np.ndarray,
    settings: RewardConfig,
    *,
    direct_similarities: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    max_tokens: int = 0,
) -> dict[str, np.ndarray]:
    """Terms of the reward of G completions, [G] float64 by name.

    All terms are 0 where a completion is invalid. Cosines [G,C] to distinct candidates, grades [C] ≥ 0, valid
    [G] bool; `direct_similarities` [C] for `gain_over_direct`, `tokens` [G] of each reply where length has a
    weight. The sum (`total_reward`) of a valid completion, in [floor_gap, 1], is

        floor_gap + (1 − floor_gap) · (value + w · (1 − excess)) / (1 + w)

    with value in [0,1] by variant, w = length_weight, excess = (tokens − free_tokens) / (max_tokens −
    free_tokens) in [0,1]. Terms: `format`; `retrieval`, or `rank` and `margin` of `rank_margin`; `length` ≤ 0
    where it has a weight. Raises ValueError without a positive candidate, on a similarity of a valid
    completion that is not finite, and without what the settings need.
    """
    valid = np.asarray(valid, dtype=bool)
    check_similarities(similarities, valid)
    scores = np.where(valid[:, None], np.asarray(similarities, dtype=np.float64), 0)
    if settings.variant == "dcg":
        values = {"retrieval": dcg_reward(scores, relevance, temperature=settings.temperature)}
    elif settings.variant == "log_rank":
        values = {"retrieval": log_rank_reward(scores, relevance, temperature=settings.temperature)}
    elif settings.variant == "rank_margin":
        rank, margin = rank_and_margin(
            scores,
            relevance,
            temperature=settings.temperature,
            margin_width=settings.margin_width,
            hard_negatives=settings.hard_negatives,
        )
        values = {"rank": (1 - settings.margin_weight) * rank, "margin": settings.margin_weight * margin}
    elif settings.variant == "gain_over_direct":
        if direct_similarities is None:
            raise ValueError("gain_over_direct needs the similarities of the query's direct embedding")
        check_similarities(direct_similarities[None], np.ones(1, dtype=bool))
        direct = dcg_reward(direct_similarities[None], relevance, temperature=settings.temperature)
        values = {
            "retrieval": 0.5
            + 0.5 * (dcg_reward(scores, relevance, temperature=settings.temperature) - direct)
        }
    else:
        raise ValueError(f"unknown reward {settings.variant!r}")

    weight = settings.length_weight
    scale = (1 - settings.floor_gap) / (1 + weight)
    terms = {name: scale * value for name, value in values.items()}
    if weight > 0:
        if tokens is None:
            raise ValueError(f"length_weight {weight} needs the tokens of each reply")
        excess = (np.asarray(tokens, dtype=np.float64) - settings.free_tokens) / (
            max_tokens - settings.free_tokens
        )
        terms["length"] = -scale * weight * np.clip(excess, 0, 1)
    terms["format"] = np.full(len(valid), settings.floor_gap + scale * weight)
    return {name: np.where(valid, term, 0.0) for name, term in terms.items()}


def total_reward(terms: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of the terms [G], float32: 0 if invalid, else floor_gap … 1.

    Raises ValueError where it is not finite.
    """
    rewards = np.sum(list(terms.values()), axis=0).astype(np.float32)
    if not np.isfinite(rewards).all():
        raise ValueError(
            "rewards are not finite; terms: "
            f"{', '.join(n for n, term in terms.items() if not np.isfinite(term).all())}"
        )
    return rewards


def dcg_reward(similarities: np.ndarray, relevance: np.ndarray, *, temperature: float = 0.02) -> np.ndarray:
    """DCG of soft ranks / ideal DCG, [G] float64 in [0,1], of cosines [G,C] and grades [C] ≥ 0.

    At temperature → 0 it is linear-gain nDCG. Soft rank of a positive = 1 + Σ over other candidates of
    sigmoid((s_other − s_positive) / temperature), after Qin et al. 2010 (ApproxNDCG). Between positives of
    one grade the order is hard: which of them leads, and by how much, earns nothing. Raises ValueError
    without a positive candidate or with a temperature ≤ 0.
    """
    scores, grades, positives = _checked(similarities, relevance, temperature)
    ahead_gpc = _sigmoid((scores[:, None, :] - scores[:, positives, None]) / temperature)
    same_grade_pc = grades[None, :] == grades[positives, None]
    ahead_gpc = np.where(same_grade_pc, _precedes(scores, positives), ahead_gpc)
    soft_rank_gp = 1 + ahead_gpc.sum(axis=2)
    ideal = (np.sort(grades)[::-1] / np.log2(np.arange(len(grades)) + 2)).sum()
    return (grades[positives] / np.log2(1 + soft_rank_gp)).sum(axis=1) / ideal


def log_rank_reward(
    similarities: np.ndarray, relevance: np.ndarray, *, temperature: float = 0.02
) -> np.ndarray:
    """1 − log(rank of the best positive) / log(1 + N), [G] float64 in [0,1], of cosines [G,C].

    Grades [C] count as positive or not; N is the number of negatives. After LREM (arXiv 2510.14321), which
    rewards the logarithm of the rank; the mapping to [0,1] is ours: 1 where a positive leads, 0 where all
    negatives do. The rank is soft: 1 + Σ over negatives of sigmoid((s_negative − max s_positive) /
    temperature). Raises as `dcg_reward`.
    """
    scores, grades, positives = _checked(similarities, relevance, temperature)
    negatives = scores[:, grades <= 0]
    if negatives.shape[1] == 0:
        return np.ones(len(scores))
    best = scores[:, positives].max(axis=1, keepdims=True)
    rank = 1 + _sigmoid((negatives - best) / temperature).sum(axis=1)
    return 1 - np.log(rank) / np.log(1 + negatives.shape[1])


def rank_and_margin(
    similarities: np.ndarray,
    relevance: np.ndarray,
    *,
    temperature: float = 0.02,
    margin_width: float = 0.5,
    hard_negatives: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of `rank_margin`: cosines [G,C], grades [C] → rank and margin, each [G] float64 in [0,1].

    After UME-R1 (arXiv 2511.00405), which rewards ranks and the gap between similarities; the formulas are
    ours. Rank: the mean over positives of 1 / (1 + Σ over negatives of sigmoid((s_negative − s_positive) /
    temperature)). Margin: 0.5 + m / (2 · margin_width), cut to [0,1], m = mean s_positive − mean of the
    `hard_negatives` highest s_negative. Both are 1 without a negative. Grades count as positive or not.
    Raises as `dcg_reward`.
    """
    scores, grades, positives = _checked(similarities, relevance, temperature)
    negatives = scores[:, grades <= 0]
    if negatives.shape[1] == 0:
        return np.ones(len(scores)), np.ones(len(scores))
    ahead_gp = _sigmoid((negatives[:, None, :] - scores[:, positives, None]) / temperature).sum(axis=2)
    hardest = np.sort(negatives, axis=1)[:, -hard_negatives:]
    margin = scores[:, positives].mean(axis=1) - hardest.mean(axis=1)
    return (1 / (1 + ahead_gp)).mean(axis=1), np.clip(0.5 + margin / (2 * margin_width), 0, 1)


def within_group_variance(terms: Mapping[str, np.ndarray], group_id: np.ndarray) -> dict[str, float]:
    """Mean over groups of each term's variance; exactly 0 where the term is constant in every group.

    Terms are [B], `group_id` [B] int. Group-relative advantages subtract what a group has in common: a term
    of variance 0 gives no signal.
    """
    _, group_b = np.unique(group_id, return_inverse=True)
    size_g = np.bincount(group_b)
    variances = {}
    for name, term in terms.items():
        values_b = np.asarray(term, dtype=np.float64)
        # Offsets from a member of the group: equal values have variance exactly 0 in spite of rounding.
        first_g = values_b[np.unique(group_b, return_index=True)[1]]
        offset_b = values_b - first_g[group_b]
        mean_g = np.bincount(group_b, offset_b) / size_g
        variances[name] = float(np.mean(np.bincount(group_b, (offset_b - mean_g[group_b]) ** 2) / size_g))
    return variances


def constant_terms(variances: Mapping[str, float]) -> list[str]:
    """Names of the terms that are constant in every group, from `within_group_variance`."""
    return [name for name, variance in variances.items() if variance == 0]


def check_candidates(*, documents: int, candidates: int) -> None:
    """Raise UserError for a corpus smaller than the candidates of a query."""
    if documents < candidates:
        raise UserError(
            f"config: index.candidates: {candidates} exceeds the {documents} documents of the corpus"
        )


def check_similarities(similarities: np.ndarray, valid: np.ndarray) -> None:
    """Raise ValueError where a similarity [G,C] of a valid [G] completion is not finite."""
    wrong = np.flatnonzero(valid & ~np.isfinite(similarities).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"similarities of completion {wrong[0]} are not finite ({len(wrong)} of {np.sum(valid)} valid "
            "ones)"
        )


def _checked(
    similarities: np.ndarray, relevance: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [G,C] and grades [C] float64, and where the positives are."""
    positives = np.flatnonzero(np.asarray(relevance) > 0)
    if len(positives) == 0 or temperature <= 0:
        raise ValueError(
            f"{len(positives)} positives, temperature {temperature}: want at least one, and above 0"
        )
    return np.asarray(similarities, dtype=np.float64), np.asarray(relevance, dtype=np.float64), positives


def _precedes(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """1.0 where candidate c comes before positive p by score, ties by position: [G,C], [P] → [G,P,C]."""
    higher = scores[:, None, :] > scores[:, positives, None]
    tied = scores[:, None, :] == scores[:, positives, None]
    earlier_pc = np.arange(scores.shape[1])[None, :] < positives[:, None]
    return (higher | (tied & earlier_pc)).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # tanh, because exp would overflow at low temperatures.
    return 0.5 * (1 + np.tanh(0.5 * x))
