"""Attention against a float64 loop over single queries, and the two backends against each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from search_r3_jax.models.attention import Backend, attend, make_attention
from search_r3_jax.models.kv_block import EMPTY_POSITION

B, T, N, K, H, PREFIX, CACHE = 4, 21, 6, 2, 16, 5, 9


class Case:
    """Random queries and keys: a prefix that all rows share, a cache that pairs of rows share, and padded,
    packed rows of their own."""

    def __init__(self, seed: int = 0):
        generator = np.random.default_rng(seed)

        def normal(rows: int, length: int, heads: int) -> np.ndarray:
            return generator.standard_normal((rows, length, heads, H)).astype(np.float32)

        self.q = normal(B, T, N)
        self.keys_values = [
            (normal(rows, length, K), normal(rows, length, K))
            for rows, length in ((1, PREFIX), (2, CACHE), (B, T))
        ]
        prefix = np.arange(PREFIX, dtype=np.int32)[None]
        cache = np.where(
            np.arange(CACHE) < np.array([[9], [4]]), PREFIX + np.arange(CACHE), EMPTY_POSITION
        ).astype(np.int32)
        # Two texts a row, the second of them padded.
        lengths = [(8, 13), (10, 6), (21, 0), (1, 9)]
        self.positions = np.full((B, T), EMPTY_POSITION, np.int32)
        self.segments = np.full((B, T), -1, np.int32)
        for row, (first, second) in enumerate(lengths):
            start = PREFIX + CACHE
            self.positions[row, :first], self.segments[row, :first] = start + np.arange(first), 0
            self.positions[row, first : first + second], self.segments[row, first : first + second] = (
                start + np.arange(second),
                1,
            )
        self.context_positions = [prefix, cache]

    def run(self, backend: Backend, window: int) -> tuple[np.ndarray, Any]:
        contexts = [(jnp.asarray(at), None) for at in self.context_positions]
        weights = (
            np.random.default_rng(1).standard_normal(self.q.shape)
            * (self.positions != EMPTY_POSITION)[..., None, None]
        )

        def output(q: jax.Array, keys_values: Any) -> jax.Array:
            attend = make_attention(
                backend,
                jnp.asarray(self.positions),
                jnp.asarray(self.segments),
                contexts,
                None,
                window=window,
            )
            return attend(q / np.sqrt(H).astype(np.float32), keys_values)

        def loss(q: jax.Array, keys_values: Any) -> jax.Array:
            return jnp.sum(output(q, keys_values) * weights)

        return np.asarray(jax.jit(output)(self.q, self.keys_values)), jax.jit(jax.grad(loss, argnums=(0, 1)))(
            self.q, self.keys_values
        )

    def by_hand(self, window: int) -> np.ndarray:
        output = np.zeros(self.q.shape)
        for b in range(B):
            for t in np.flatnonzero(self.positions[b] != EMPTY_POSITION):
                at = int(self.positions[b, t])
                for n in range(N):
                    scores, values = [], []
                    for block, (keys, block_values) in enumerate(self.keys_values):
                        row = b // (B // keys.shape[0])
                        positions = self.positions[b] if block == 2 else self.context_positions[block][row]
                        for s in np.flatnonzero(positions != EMPTY_POSITION):
                            apart = block == 2 and self.segments[b, s] != self.segments[b, t]
                            if (
                                positions[s] <= at
                                and not apart
                                and (window == 0 or at - positions[s] < window)
                            ):
                                key = keys[row, s, n // (N // K)].astype(np.float64)
                                scores.append(key @ self.q[b, t, n].astype(np.float64) / np.sqrt(H))
                                values.append(block_values[row, s, n // (N // K)].astype(np.float64))
                    weights = np.exp(np.array(scores) - max(scores))
                    output[b, t, n] = weights @ np.array(values) / weights.sum()
        return output


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_output_equals_a_loop_in_float64(backend: Backend, window: int) -> None:
    case = Case()
    found, _ = case.run(backend, window)
    there = case.positions != EMPTY_POSITION
    np.testing.assert_allclose(found[there], case.by_hand(window)[there], atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("window", [0, 7])
def test_gradients_agree_between_backends(window: int) -> None:
    case = Case(seed=2)

    def found(backend: Backend) -> Any:
        return case.run(backend, window)[1]

    jax.tree.map(
        lambda mine, expected: np.testing.assert_allclose(mine, expected, atol=5e-6),
        found("splash"),
        found("xla"),
    )


def test_few_queries_read_shared_blocks_as_many_do() -> None:
    case, generator = Case(), np.random.default_rng(2)
    lengths = [(len(keys), keys.shape[1]) for keys, _ in case.keys_values]
    masks = [generator.random((B, T, S)) < 0.7 for _, S in lengths]
    masks[0][..., 0] = True

    def output(first: int) -> np.ndarray:
        blocks = [
            (jnp.asarray(keys), jnp.asarray(values), jnp.asarray(mask[:, :first].reshape(rows, -1, S)))
            for (keys, values), mask, (rows, S) in zip(case.keys_values, masks, lengths, strict=True)
        ]
        return np.asarray(attend(jnp.asarray(case.q[:, :first]), blocks))

    # One query has fewer scores than a head has numbers, and its blocks are not copied; all of them have
    # more, and theirs are.
    assert N < K * H <= T * N
    np.testing.assert_allclose(output(1), output(T)[:, :1], rtol=0, atol=2e-6)


def test_scores_beyond_float32_do_not_overflow() -> None:
    case = Case(seed=3)
    case.q *= 1e4
    for backend in ("xla", "splash"):
        found, gradients = case.run(backend, 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, gradients)))


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_row_of_padding_alone_stays_finite(backend: Backend) -> None:
    """Nothing is visible in any tile of it: neither its output nor a gradient may become NaN and reach the
    other rows."""
    case = Case(seed=4)
    case.positions[1], case.segments[1] = EMPTY_POSITION, -1
    found, gradients = case.run(backend, 0)
    assert np.isfinite(found).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    there = case.positions != EMPTY_POSITION
    np.testing.assert_allclose(found[there], case.by_hand(0)[there], atol=2e-6)


@pytest.mark.parametrize("head_size", [64, 128])
def test_backends_agree_in_bfloat16_on_packed_texts_behind_a_prefix(head_size: int) -> None:
    generator = np.random.default_rng(5)
    rows, queries, prefix, heads, kv_heads = 2, 200, 20, 4, 2

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(2 * generator.standard_normal((*shape, head_size)), jnp.bfloat16)

    positions = (
        np.concatenate([np.arange(prefix, prefix + 120), np.arange(prefix, prefix + 80)])[None]
        .repeat(rows, axis=0)
        .astype(np.int32)
    )
    segments = (np.arange(queries) >= 120).astype(np.int32)[None].repeat(rows, axis=0)
    positions[1, 180:], segments[1, 180:] = EMPTY_POSITION, -1
    weights = (
        np.random.default_rng(6).standard_normal((rows, queries, heads, head_size))
        * (positions != EMPTY_POSITION)[..., None, None]
    )
    q = (normal(rows, queries, heads).astype(jnp.float32) / head_size**0.5).astype(jnp.bfloat16)
    keys_values = [
        tuple(normal(b, length, kv_heads) for _ in range(2)) for b, length in ((1, prefix), (rows, queries))
    ]

    def found(backend: Backend, dtype: Any) -> list[np.ndarray]:
        def loss(q: jax.Array, keys_values: Any) -> tuple[jax.Array, jax.Array]:
            context = [(jnp.arange(prefix, dtype=jnp.int32)[None], None)]
            output = make_attention(backend, jnp.asarray(positions), jnp.asarray(segments), context, None)(
                q, keys_values
            )
            return jnp.sum(output.astype(jnp.float32) * weights), jnp.where(
                (positions != EMPTY_POSITION)[..., None, None], output, 0
            )

        arrays = jax.tree.map(lambda x: x.astype(dtype), (q, keys_values))
        gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
        return [np.asarray(x, np.float64) for x in (output, *jax.tree.leaves(gradients))]

    def difference(mine: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(mine - other) / np.linalg.norm(other))

    exact, (plain, *plain_gradients), (tiled, *tiled_gradients) = (
        found("xla", jnp.float32),
        found("xla", jnp.bfloat16),
        found("splash", jnp.bfloat16),
    )
    assert difference(tiled, plain) <= 1e-3
    # Both round once, at the end; the kernel's gradients also between its products.
    assert difference(tiled, exact[0]) <= 2**-9
    for mine, other, true in zip(tiled_gradients, plain_gradients, exact[1:], strict=True):
        assert difference(mine, other) <= 1e-2
        assert difference(other, true) <= 2**-8
