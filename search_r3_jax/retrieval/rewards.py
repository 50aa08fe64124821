"""Rewards of one query's group of completions, from the similarities to its candidates; plain numpy, all in [0,1]."""

from typing import Literal

import numpy as np

RewardVariant = Literal["dcg"]


def reward_group(
    similarities: np.ndarray,
    relevance: np.ndarray,
    valid: np.ndarray,
    *,
    variant: RewardVariant = "dcg",
    temperature: float = 0.02,
    floor_gap: float = 0.1,
) -> np.ndarray:
    """Cosines [G,C] to distinct candidates, grades [C], valid [G] bool → [G] float32: 0 if invalid, else floor_gap … 1."""
    if not 0 < floor_gap < 1:
        raise ValueError(f"floor_gap {floor_gap} is not between 0 and 1: invalid must be worse than the worst valid")
    if variant == "dcg":
        rewards = dcg_reward(similarities, relevance, temperature=temperature)
    else:
        raise ValueError(f"unknown reward variant {variant!r}")
    return np.where(valid, floor_gap + (1 - floor_gap) * rewards, 0.0).astype(np.float32)


def dcg_reward(similarities: np.ndarray, relevance: np.ndarray, *, temperature: float = 0.02) -> np.ndarray:
    """Cosines [G,C], grades [C] ≥ 0 → DCG of soft ranks / ideal DCG, [G] float64 in [0,1]; at temperature → 0 linear-gain nDCG.

    Soft rank of a positive = 1 + Σ over other candidates of sigmoid((s_other − s_positive) / temperature), after
    Qin et al. 2010 (ApproxNDCG). Between positives of one grade the order is hard: which of them leads, and by how
    much, earns nothing. Raises ValueError without a positive candidate or with a temperature ≤ 0.
    """
    positives = np.flatnonzero(relevance > 0)
    if len(positives) == 0 or temperature <= 0:
        raise ValueError(f"{len(positives)} positives, temperature {temperature}: want at least one, and above 0")
    scores = np.asarray(similarities, dtype=np.float64)
    grades = np.asarray(relevance, dtype=np.float64)
    ahead_gpc = _sigmoid((scores[:, None, :] - scores[:, positives, None]) / temperature)
    same_grade_pc = grades[None, :] == grades[positives, None]
    ahead_gpc = np.where(same_grade_pc, _precedes(scores, positives), ahead_gpc)
    soft_rank_gp = 1 + ahead_gpc.sum(axis=2)
    ideal = (np.sort(grades)[::-1] / np.log2(np.arange(len(grades)) + 2)).sum()
    return (grades[positives] / np.log2(1 + soft_rank_gp)).sum(axis=1) / ideal


def _precedes(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """1.0 where candidate c comes before positive p by score, ties by position: [G,C], [P] → [G,P,C]."""
    higher = scores[:, None, :] > scores[:, positives, None]
    tied = scores[:, None, :] == scores[:, positives, None]
    earlier_pc = np.arange(scores.shape[1])[None, :] < positives[:, None]
    return (higher | (tied & earlier_pc)).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # By tanh: exp would overflow at low temperatures.
    return 0.5 * (1 + np.tanh(0.5 * x))
