"""InfoNCE against a float64 computation by hand and against sentence-transformers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from search_r3_jax.objectives.contrastive import info_nce


def unit_rows(rows: int, dimension: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_hand(queries: np.ndarray, documents: np.ndarray, positive: np.ndarray, excluded: np.ndarray, temperature: float) -> float:
    total = 0.0
    for b, query in enumerate(queries.astype(np.float64)):
        keep = [p for p in range(len(documents)) if p == positive[b] or not excluded[b, p]]
        scores = np.array([query @ documents[p].astype(np.float64) / temperature for p in keep])
        total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[keep.index(positive[b])]
    return total


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_equals_float64_by_hand_with_exclusions(share: float) -> None:
    queries, documents = unit_rows(6, 16, 0), unit_rows(9, 16, 1)
    generator = np.random.default_rng(2)
    positive = generator.permutation(9)[:6].astype(np.int32)
    excluded = generator.random((6, 9)) < share
    total, count, hits = info_nce(jnp.asarray(queries), jnp.asarray(documents), jnp.asarray(positive), jnp.asarray(excluded), 0.2)
    assert count == 6
    np.testing.assert_allclose(total, by_hand(queries, documents, positive, excluded, 0.2), rtol=1e-6)
    scores = np.where(excluded & ~np.eye(9, dtype=bool)[positive], -np.inf, queries @ documents.T)
    assert hits == (scores.argmax(-1) == positive).sum()


def test_equals_sentence_transformers() -> None:
    queries, documents = unit_rows(8, 32, 3), unit_rows(8, 32, 4)
    no_model: Any = torch.nn.Identity()
    theirs = MultipleNegativesRankingLoss(no_model, scale=20.0)
    expected = theirs.compute_loss_from_embeddings([torch.tensor(queries), torch.tensor(documents)], torch.empty(0)).item()
    positive, excluded = jnp.arange(8, dtype=jnp.int32), jnp.zeros((8, 8), bool)
    total, count, _ = info_nce(jnp.asarray(queries), jnp.asarray(documents), positive, excluded, 0.05)
    assert abs(float(total / count) - expected) <= 1e-6 * max(1.0, expected)
