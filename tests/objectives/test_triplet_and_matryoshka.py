"""The triplet loss and Matryoshka against float64 by hand and against sentence-transformers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.contrastive_float64 import float64, triplet_by_hand, unit_rows
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    TripletLoss,
)
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric

from search_r3_jax.objectives.contrastive import info_nce, matryoshka, triplet_margin

B, P, E = 6, 10, 16


class FixedVectors(torch.nn.Module):
    """Stands for a model: a text is its vector."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return E


@pytest.mark.parametrize("mined", [False, True])
def test_triplet_equals_float64_pair_by_pair(mined: bool) -> None:
    generator = np.random.default_rng(0)
    queries, documents = unit_rows(B, E, 1), unit_rows(P, E, 2)
    relevance = np.where(generator.random((B, P)) < 0.25, generator.integers(1, 4, (B, P)), 0).astype(
        np.float32
    )
    relevance[:, 0] = 1
    relevance[0] = 0
    excluded = generator.random((B, P)) < 0.3
    excluded[1] = True
    valid = np.array([True, True, True, False, True, True])
    mined_rows = generator.integers(-1, P, (B, 4)) if mined else None

    def mean(queries: jax.Array, documents: jax.Array) -> tuple[jax.Array, Any]:
        total, count, scalars = triplet_margin(
            queries,
            documents,
            jnp.asarray(relevance),
            jnp.asarray(excluded),
            margin=0.15,
            mined_bk=None if mined_rows is None else jnp.asarray(mined_rows),
            valid_b=jnp.asarray(valid),
        )
        return total / count, (count, scalars["active"])

    (value, (count, active)), gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(
        queries, documents
    )
    leaves = float64(queries), float64(documents)
    expected, expected_count, expected_active = triplet_by_hand(
        *leaves, relevance, excluded, 0.15, mined_rows, valid
    )
    (expected / expected_count).backward()
    assert float(count) == expected_count > 2
    assert float(active) == pytest.approx(expected_active, rel=1e-6)
    assert float(value) == pytest.approx(expected.item() / expected_count, rel=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-6)


def test_triplet_equals_sentence_transformers() -> None:
    columns = [unit_rows(8, E, seed) for seed in range(3)]
    no_model: Any = FixedVectors()
    theirs = TripletLoss(no_model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.15)
    expected = theirs(
        [{"vectors": torch.tensor(column, dtype=torch.float64)} for column in columns], torch.empty(0)
    ).item()
    total, count, scalars = triplet_margin(
        jnp.asarray(columns[0]),
        jnp.concatenate(columns[1:]),
        jax.nn.one_hot(jnp.arange(8), 16),
        jnp.zeros((8, 16), bool),
        margin=0.15,
        mined_bk=8 + jnp.arange(8)[:, None],
    )
    assert float(total / count) == pytest.approx(expected, rel=1e-6)
    assert 0 < float(scalars["active"]) < 8


def test_triplet_of_degenerate_rows_is_finite_and_a_met_margin_has_no_gradient() -> None:
    queries, documents = unit_rows(3, E, 3), unit_rows(4, E, 4)
    queries[0], documents[1] = 0, 0
    relevance = jnp.eye(3, 4)

    def loss(queries: jax.Array, excluded: jax.Array, margin: float) -> jax.Array:
        return triplet_margin(queries, jnp.asarray(documents), relevance, excluded, margin=margin)[0]

    excluded = jnp.zeros((3, 4), bool).at[2].set(True)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(queries), excluded, 0.15)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[2] == 0).all()
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(queries), excluded, -3.0)
    assert float(value) == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
@pytest.mark.parametrize("which", ["info_nce", "triplet"])
@pytest.mark.slow
def test_matryoshka_equals_sentence_transformers(which: str, weights: list[float] | None) -> None:
    columns = [unit_rows(8, E, seed) for seed in range(3)]
    leaves = [float64(column) for column in columns]
    no_model: Any = FixedVectors()
    theirs: Any = (
        MultipleNegativesRankingLoss(no_model, scale=20.0)
        if which == "info_nce"
        else TripletLoss(no_model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.15)
    )
    expected = MatryoshkaLoss(no_model, theirs, [E, 8, 3], weights)(
        [{"vectors": leaf} for leaf in leaves], torch.empty(0)
    )
    expected.backward()
    relevance, excluded = jax.nn.one_hot(jnp.arange(8), 16), jnp.zeros((8, 16), bool)
    options: dict[str, Any] = {"relevance_bp": relevance, "excluded_bp": excluded}
    loss = (
        partial(info_nce, temperature=0.05, **options)
        if which == "info_nce"
        else partial(triplet_margin, margin=0.15, mined_bk=8 + jnp.arange(8)[:, None], **options)
    )

    def mean(*columns: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, count, scalars = matryoshka(loss, [E, 8, 3], weights)(columns[0], jnp.concatenate(columns[1:]))
        return total / count, scalars

    (value, scalars), gradients = jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)(*columns)
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    assert {name.rsplit("_", 1)[1] for name in scalars} == {"16", "8", "3"}
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(
            gradient, leaf.grad.numpy(), atol=1e-6 * max(1.0, np.abs(leaf.grad.numpy()).max())
        )


@pytest.mark.slow
def test_matryoshka_of_a_vector_that_is_zero_where_it_is_cut_is_finite() -> None:
    queries, documents = unit_rows(3, E, 5), unit_rows(3, E, 6)
    queries[0, :4] = 0
    loss = matryoshka(
        partial(info_nce, relevance_bp=jnp.eye(3), excluded_bp=jnp.zeros((3, 3), bool), temperature=0.05),
        [4, E],
    )
    value, gradient = jax.value_and_grad(lambda q: loss(q, jnp.asarray(documents))[0])(jnp.asarray(queries))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_matryoshka_refuses_a_dimension_that_is_not_there() -> None:
    loss = matryoshka(lambda x: (jnp.sum(x), jnp.ones(()), {}), [E, 2 * E])
    with pytest.raises(ValueError, match="32: the vectors have 16"):
        loss(jnp.ones((2, E)))
