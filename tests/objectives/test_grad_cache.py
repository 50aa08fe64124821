"""GradCache: the gradient of the whole batch, in the memory of one chunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from search_r3_jax.objectives.contrastive import info_nce
from search_r3_jax.objectives.grad_cache import cached_value_and_grad

INPUTS, HIDDEN, E = 12, 32, 16


class Encoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, hidden: int = HIDDEN):
        self.inner, self.outer = nnx.Linear(INPUTS, hidden, rngs=rngs), nnx.Linear(hidden, E, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.outer(nnx.gelu(self.inner(x)))
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


def make(hidden: int = HIDDEN) -> tuple[Any, nnx.State, Any]:
    graph, params = nnx.split(Encoder(nnx.Rngs(0), hidden))

    def encode(params: nnx.State, chunk: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        vectors = nnx.merge(graph, params)(chunk["x"])
        if "key" in chunk:
            vectors += 0.01 * jax.random.normal(chunk["key"][0], vectors.shape)
        sums = {
            "penalty": jnp.sum(jnp.where(chunk["counts"][:, None], vectors, 0) ** 4),
            "count": jnp.sum(chunk["counts"] * 1.0),
        }
        return vectors, sums

    return graph, params, encode


def contrast(
    sums: dict[str, jax.Array], queries: jax.Array, documents: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    B, P = queries.shape[0], documents.shape[0]
    total, count, scalars = info_nce(
        queries, documents, jnp.eye(B, P), jnp.zeros((B, P), bool), temperature=0.05
    )
    penalty = sums["penalty"] / sums["count"]
    return total / count + penalty, {"penalty": penalty, **scalars}


def batch(rows: int, chunks: int, seed: int) -> dict[str, jax.Array]:
    generator = np.random.default_rng(seed)
    x, counts = generator.standard_normal((rows, INPUTS)), generator.random(rows) < 0.5
    return {
        "x": jnp.asarray(x, jnp.float32).reshape(chunks, -1, INPUTS),
        "counts": jnp.asarray(counts).reshape(chunks, -1),
    }


@pytest.mark.parametrize(("query_chunks", "document_chunks"), [(1, 1), (4, 4), (8, 3), (24, 48)])
def test_equals_the_whole_batch_at_once(query_chunks: int, document_chunks: int) -> None:
    _, params, encode = make()
    queries, documents = batch(24, query_chunks, 0), batch(48, document_chunks, 1)

    def whole(params: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = [
            encode(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks))
            for chunks in (queries, documents)
        ]
        return contrast(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), parts[0][0], parts[1][0])

    (expected, expected_scalars), expected_gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    (value, scalars), gradient = jax.jit(cached_value_and_grad(encode, contrast))(params, queries, documents)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert {name: float(x) for name, x in scalars.items()} == pytest.approx(
        {name: float(x) for name, x in expected_scalars.items()}
    )
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_the_second_pass_draws_the_same_random_numbers() -> None:
    _, params, encode = make()
    keyed = {**batch(16, 4, 0), "key": jax.random.split(jax.random.key(0), (4, 1))}
    documents = batch(16, 4, 1)

    def value_of(params: nnx.State) -> jax.Array:
        return jax.jit(cached_value_and_grad(encode, contrast))(params, keyed, documents)[0][0]

    _, gradient = jax.jit(cached_value_and_grad(encode, contrast))(params, keyed, documents)
    direction = jax.tree.map(
        lambda x: x / jnp.sqrt(sum(jnp.sum(y**2) for y in jax.tree.leaves(gradient))), gradient
    )
    slope = sum(
        jnp.sum(a * b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    step = 3e-3
    ahead, behind = (
        jax.tree.map(lambda x, d, s=sign: x + s * step * d, params, direction) for sign in (1, -1)
    )
    assert float((value_of(ahead) - value_of(behind)) / (2 * step)) == pytest.approx(float(slope), rel=5e-3)


def temporary_bytes(chunks: int) -> int:
    _, params, encode = make(hidden=8192)
    arguments = [batch(64 * chunks, chunks, seed) for seed in (0, 1)]

    def mean_square(
        sums: dict[str, jax.Array], queries: jax.Array, documents: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Linear in the number of embeddings, so that only what the encoder keeps is measured.
        return jnp.sum((queries - documents) ** 2) + sums["penalty"], {}

    memory = (
        jax.jit(cached_value_and_grad(encode, mean_square))
        .lower(params, *arguments)
        .compile()
        .memory_analysis()
    )
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_chunks() -> None:
    few, many = temporary_bytes(4), temporary_bytes(64)
    assert few > 64 * 8192 * 4
    assert many < 1.1 * few
