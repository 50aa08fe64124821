"""Measures how far the embeddings of a fixed part of the corpus have moved since a checkpoint."""

from __future__ import annotations

import dataclasses

import numpy as np

OVERLAP_AT = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """Similarity of two sets of embeddings of the same documents.

    Attributes:
      cosine: mean cosine of each document's vector then and now; 1 is no drift.
      overlap: mean share of each document's ten nearest among the others that still are; 1 is no drift.
    """

    cosine: float
    overlap: float


def probe_rows(rows: int, count: int) -> np.ndarray:
    """`count` rows, int32, spread evenly over a corpus of `rows`; always the same ones."""
    return np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(np.int32))


def measure_drift(then: np.ndarray, now: np.ndarray) -> Drift:
    """Drift between unit vectors [n,E] of the same documents, n ≥ 2."""
    if then.shape != now.shape or len(then) < 2:
        raise ValueError(f"vectors {then.shape} and {now.shape}: want two of the same documents at least")
    k = min(OVERLAP_AT, len(then) - 1)
    before, after = _nearest(then, k), _nearest(now, k)
    shared = (before[:, :, None] == after[:, None, :]).any(axis=2)
    return Drift(cosine=float(np.einsum("ne,ne->n", then, now).mean()), overlap=float(shared.mean()))


def _nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k nearest other rows [n,k] of each row."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]
