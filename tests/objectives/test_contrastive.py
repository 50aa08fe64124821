"""InfoNCE against a float64 computation pair by pair and against sentence-transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.contrastive_float64 import float64, info_nce_by_hand, unit_rows
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from search_r3_jax.objectives.contrastive import Direction, exclusions, info_nce

ALL: tuple[Direction, ...] = (
    "query_to_document",
    "query_to_query",
    "document_to_query",
    "document_to_document",
)
BOTH: tuple[Direction, ...] = ("query_to_document", "document_to_query")
THEIR_NAMES = {
    "query_to_document": "query_to_doc",
    "query_to_query": "query_to_query",
    "document_to_query": "doc_to_query",
    "document_to_document": "doc_to_doc",
}
B, P, E = 7, 12, 16


def mean_and_gradients(
    queries: np.ndarray, documents: np.ndarray, *arguments: Any, **options: Any
) -> tuple[Any, ...]:
    """`(mean, (gradient by queries, by documents), count, scalars)` of our loss under jit."""

    def mean(
        queries: jax.Array, documents: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        total, count, scalars = info_nce(queries, documents, *(jnp.asarray(x) for x in arguments), **options)
        return total / jnp.maximum(count, 1), (count, scalars)

    (value, (count, scalars)), gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(
        queries, documents
    )
    return float(value), gradients, float(count), {name: float(x) for name, x in scalars.items()}


def graded(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Relevance with several graded positives, shared documents and a query without any; and exclusions, some
    of them on positives."""
    generator = np.random.default_rng(seed)
    relevance = np.where(generator.random((B, P)) < 0.2, generator.integers(1, 4, (B, P)), 0).astype(
        np.float32
    )
    relevance[0], relevance[1, :2], relevance[2, 0] = 0, (3, 1), 2
    return relevance, generator.random((B, P)) < 0.2


@pytest.mark.parametrize("margin", [None, 0.1, -0.3])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [(ALL[:1], "joint"), (BOTH, "joint"), (BOTH, "per_direction"), (ALL, "joint"), (ALL[:2], "joint")],
)
def test_equals_float64_pair_by_pair(
    directions: tuple[Direction, ...], partition: Any, margin: float | None
) -> None:
    relevance, excluded = graded(0)
    generator = np.random.default_rng(1)
    valid, weight = np.array([True] * 5 + [False, True]), generator.uniform(0.5, 2, B).astype(np.float32)
    own = generator.random((B, P)) < 0.1
    queries, documents = unit_rows(B, E, 2), unit_rows(P, E, 3)
    value, gradients, count, _ = mean_and_gradients(
        queries,
        documents,
        relevance,
        excluded,
        temperature=0.2,
        directions=directions,
        partition=partition,
        mined_bp=own,
        false_negative_margin=margin,
        valid_b=valid,
        query_weight_b=weight,
    )
    leaves = float64(queries), float64(documents)
    expected, expected_count = info_nce_by_hand(
        *leaves, relevance, excluded, 0.2, directions, partition, own, margin, valid=valid, weight=weight
    )
    mean = expected / expected_count
    mean.backward()
    assert count == pytest.approx(expected_count, rel=1e-6)
    assert value == pytest.approx(mean.item(), rel=1e-6)
    assert mean.item() > 0.1
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-6)


def test_scalars_count_hits_and_the_documents_in_the_denominator() -> None:
    relevance, excluded = graded(4)
    queries, documents = unit_rows(B, E, 5), unit_rows(P, E, 6)
    cosines = queries @ documents.T
    for margin in (None, 0.05):
        scalars = mean_and_gradients(
            queries, documents, relevance, excluded, temperature=0.05, false_negative_margin=margin
        )[3]
        hits, negatives = 0, 0.0
        for b in range(1, B):
            positive, negative = relevance[b] > 0, (relevance[b] == 0) & ~excluded[b]
            hits += bool(positive.any() and cosines[b][positive].max() > cosines[b][negative].max())
            for p in np.flatnonzero(positive):
                kept = negative & (True if margin is None else cosines[b] <= cosines[b, p] - margin)
                negatives += kept.sum() * relevance[b, p] / relevance[b].sum()
        assert scalars["hits"] == hits
        assert scalars["negatives"] == pytest.approx(negatives, rel=1e-6)


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [(ALL[:1], "joint"), (BOTH, "per_direction"), (BOTH, "joint"), (ALL, "joint")],
)
def test_equals_sentence_transformers(
    hard_negatives: int, directions: tuple[Direction, ...], partition: Any
) -> None:
    columns = [unit_rows(8, 32, seed) for seed in range(2 + hard_negatives)]
    leaves = [float64(column) for column in columns]
    no_model: Any = torch.nn.Identity()
    their_directions: Any = tuple(THEIR_NAMES[direction] for direction in directions)
    theirs = MultipleNegativesRankingLoss(
        no_model, scale=20.0, directions=their_directions, partition_mode=partition
    )
    expected = theirs.compute_loss_from_embeddings(list(leaves), torch.empty(0))
    expected.backward()
    rows = 8 * (1 + hard_negatives)
    value, (by_queries, by_documents), count, _ = mean_and_gradients(
        columns[0],
        np.concatenate(columns[1:]),
        jax.nn.one_hot(jnp.arange(8), rows),
        np.zeros((8, rows), bool),
        temperature=0.05,
        directions=directions,
        partition=partition,
        mined_bp=np.tile(np.eye(8, dtype=bool), 1 + hard_negatives),
    )
    assert count == 8
    assert value == pytest.approx(expected.item(), rel=1e-6)
    # Their cosine normalises again: the gradient along the vector itself is projected out there.
    by_leaf = [by_queries, *np.split(np.asarray(by_documents), 1 + hard_negatives)]
    for column, gradient, leaf in zip(columns, by_leaf, leaves, strict=True):
        assert leaf.grad is not None
        tangent = gradient - np.sum(gradient * column, axis=-1, keepdims=True) * column
        expected_gradient = leaf.grad.numpy()
        np.testing.assert_allclose(
            tangent, expected_gradient, atol=1e-6 * max(1.0, np.abs(expected_gradient).max())
        )


def test_exclusions_mask_copies_known_positives_and_padding() -> None:
    document_ids = jnp.array([7, 3, 7, 9, -1, 4])
    known = jnp.array([[7, 9, -1], [3, -1, -1], [-1, -1, -1]])
    expected = [[1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(jax.jit(exclusions)(document_ids, known), np.array(expected, bool))


def test_a_copy_of_the_positive_changes_nothing() -> None:
    queries, documents = jnp.asarray(unit_rows(3, E, 7)), jnp.asarray(unit_rows(4, E, 8))
    ids, known = jnp.array([0, 1, 2, 3, 0]), jnp.array([[0], [1], [2]])
    alone = info_nce(queries, documents, jnp.eye(3, 4), exclusions(ids[:4], known), temperature=0.1)
    doubled = jnp.concatenate([documents, documents[:1]])
    first = jnp.array([True, False, False])
    options: dict[str, Any] = {"temperature": 0.1, "valid_b": first}
    with_copy = info_nce(queries, doubled, jnp.eye(3, 5), exclusions(ids, known), **options)
    only_first = info_nce(queries, documents, jnp.eye(3, 4), exclusions(ids[:4], known), **options)
    np.testing.assert_allclose(with_copy[0], only_first[0], rtol=1e-6)
    assert float(alone[1]) == 3
    assert float(with_copy[1]) == 1


@pytest.mark.parametrize("margin", [None, 0.1])
def test_padding_changes_nothing_whatever_it_holds(margin: float | None) -> None:
    relevance, excluded = graded(9)
    queries, documents = unit_rows(B, E, 10), unit_rows(P, E, 11)
    options: dict[str, Any] = {"temperature": 0.1, "directions": ALL, "false_negative_margin": margin}
    value, gradients, count, scalars = mean_and_gradients(queries, documents, relevance, excluded, **options)
    padded = mean_and_gradients(
        np.concatenate([queries, np.full((2, E), np.nan, np.float32)]),
        np.concatenate([documents, np.full((3, E), -np.inf, np.float32)]),
        np.pad(relevance, ((0, 2), (0, 3))),
        np.pad(excluded, ((0, 2), (0, 3)), constant_values=True),
        valid_b=np.arange(B + 2) < B,
        **options,
    )
    assert padded[0] == pytest.approx(value, rel=1e-6)
    assert padded[2] == count
    assert padded[3] == pytest.approx(scalars, rel=1e-6)
    for ours, theirs, rows in zip(padded[1], gradients, (B, P), strict=True):
        np.testing.assert_allclose(ours[:rows], theirs, atol=1e-7)
        np.testing.assert_array_equal(ours[rows:], 0)


@pytest.mark.parametrize("directions", [ALL[:1], ALL])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_degenerate_rows_are_finite(directions: tuple[Direction, ...], margin: float | None) -> None:
    queries, documents = unit_rows(4, E, 12), unit_rows(5, E, 13)
    queries[1], documents[1], documents[2] = 0, 0, documents[0]
    everything = np.zeros((4, 5), bool)
    everything[0] = True
    relevance = np.eye(4, 5, dtype=np.float32)
    relevance[3] = 0
    for excluded, temperature in ((everything, 0.05), (np.ones((4, 5), bool), 0.05), (everything, 1e-4)):
        value, gradients, count, _ = mean_and_gradients(
            queries,
            documents,
            relevance,
            excluded,
            temperature=temperature,
            directions=directions,
            false_negative_margin=margin,
        )
        assert count == 3
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
    value, gradients, count, _ = mean_and_gradients(
        queries, documents, np.zeros((4, 5), np.float32), everything, temperature=0.05
    )
    assert (value, count) == (0.0, 0.0)
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_a_negative_at_the_margin_is_kept_and_one_beyond_it_dropped() -> None:
    query, documents = (
        jnp.array([[1.0, 0.0]]),
        jnp.array([[0.5, 0.0], [0.25, 0.0], [0.375, 0.0], [0.75, 0.0]]),
    )
    for margin, kept in ((0.25, 1), (0.125, 2), (0.0, 2), (-0.25, 3)):
        total, _, scalars = info_nce(
            query,
            documents,
            jnp.eye(1, 4),
            jnp.zeros((1, 4), bool),
            temperature=1.0,
            false_negative_margin=margin,
        )
        negatives = np.sort(np.asarray(documents)[1:, 0])[:kept].astype(np.float64)
        assert float(scalars["negatives"]) == kept
        assert float(total) == pytest.approx(np.log1p(np.exp(negatives - 0.5).sum()), rel=1e-6)


def test_directions_that_hold_no_pair_are_refused() -> None:
    arguments = jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.zeros((2, 2), bool)
    with pytest.raises(ValueError, match="query_to_document"):
        info_nce(*arguments, temperature=1.0, directions=("document_to_query",))
    with pytest.raises(ValueError, match="joint"):
        info_nce(*arguments, temperature=1.0, directions=ALL, partition="per_direction")
