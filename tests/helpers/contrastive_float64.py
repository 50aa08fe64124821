"""InfoNCE and the triplet loss in float64, one pair at a time, as their definitions read."""

from collections.abc import Sequence

import numpy as np
import torch


def unit_rows(rows: int, dimension: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def info_nce_by_hand(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relevance: np.ndarray,
    excluded: np.ndarray,
    temperature: float,
    directions: Sequence[str] = ("query_to_document",),
    partition: str = "joint",
    own: np.ndarray | None = None,
    margin: float | None = None,
    valid: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> tuple[torch.Tensor, float]:
    B, P = relevance.shape
    is_valid = [True] * B if valid is None else list(valid)
    weights = np.ones(B) if weight is None else weight

    def positive(b: int, p: int) -> bool:
        return is_valid[b] and relevance[b, p] > 0

    def negative(b: int, p: int) -> bool:
        return is_valid[b] and relevance[b, p] == 0 and not excluded[b, p]

    def used(p: int) -> bool:
        return any(positive(b, p) or negative(b, p) for b in range(B))

    def pool(direction: str, b: int, p: int) -> list[torch.Tensor]:
        q, d = queries[b], documents[p]
        if direction == "query_to_document":
            return [q @ documents[n] for n in range(P) if negative(b, n)]
        if direction == "document_to_query":
            return [d @ queries[c] for c in range(B) if negative(c, p)]
        if direction == "query_to_query":
            related = [
                any(positive(b, x) and (positive(c, x) or excluded[c, x]) for x in range(P)) for c in range(B)
            ]
            return [q @ queries[c] for c in range(B) if c != b and is_valid[c] and not related[c]]
        mine = [c for c in range(B) if positive(c, p)]
        near = [
            any(positive(c, n) or excluded[c, n] or (own is not None and own[c, n]) for c in mine)
            for n in range(P)
        ]
        return [d @ documents[n] for n in range(P) if n != p and used(n) and not near[n]]

    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for b in range(B):
        positives = [p for p in range(P) if positive(b, p)]
        if not positives:
            continue
        count += weights[b]
        for p in positives:
            share = relevance[b, p] / sum(relevance[b, x] for x in positives)
            pair = queries[b] @ documents[p]
            pools = [
                [c for c in pool(direction, b, p) if margin is None or c <= pair - margin]
                for direction in directions
            ]
            if partition == "joint":
                twice = [pair] if "document_to_query" in directions else []
                pools = [[c for one in pools for c in one] + twice]
            losses = [
                torch.logsumexp(torch.stack([pair, *one]) / temperature, 0) - pair / temperature
                for one in pools
            ]
            total = total + weights[b] * share * torch.stack(losses).mean()
    return total, count


def triplet_by_hand(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relevance: np.ndarray,
    excluded: np.ndarray,
    margin: float,
    mined: np.ndarray | None,
    valid: np.ndarray,
) -> tuple[torch.Tensor, float, float]:
    """Sum, count and active sum."""
    total, count, active = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for b, (grades, out) in enumerate(zip(relevance, excluded, strict=True)):
        positives = [p for p in range(len(grades)) if grades[p] > 0]
        allowed = [p for p in range(len(grades)) if grades[p] == 0 and not out[p]]
        if mined is None:
            negatives = sorted(allowed, key=lambda p: float((queries[b] @ documents[p]).detach()))[-1:]
        else:
            negatives = [p for p in mined[b] if p in allowed]
        if not (valid[b] and positives and negatives):
            continue
        count += 1
        for p in positives:
            for n in negatives:
                share = grades[p] / grades.sum() / len(negatives)
                excess = queries[b] @ documents[n] - queries[b] @ documents[p] + margin
                total = total + share * torch.relu(excess)
                active += share * float(excess > 0)
    return total, count, active


def float64(x: np.ndarray) -> torch.Tensor:
    """A leaf that collects a gradient."""
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)
