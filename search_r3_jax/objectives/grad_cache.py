"""GradCache (arXiv 2101.06983): a loss over all embeddings of a batch in the memory of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Pytree = Any


def cached_value_and_grad(
    encode: Callable[[Pytree, Pytree], tuple[Pytree, Pytree]],
    loss: Callable[..., tuple[jax.Array, Pytree]],
) -> Callable[..., tuple[tuple[jax.Array, Pytree], Pytree]]:
    """A function `(params, *chunked) → ((value, scalars), gradient)` that encodes chunk by chunk.

    The backward pass encodes each chunk again.

    Args:
        encode: `(params, chunk) → (vectors, sums)`; vectors is a pytree of [C, ...], sums a pytree of
            floating arrays that are added over all chunks ({} for none), such as the sums and counts of a
            language loss.
        loss: `(sums, *vectors) → (value, scalars)`; vectors are those of all chunks, [number · C, ...] in the
            order of the chunks, one argument for each of `chunked`. Gradients flow through the sums as well.

    Each of `chunked` is a pytree of arrays [number, C, ...]; queries and documents may differ in number, size
    and structure. The gradient is that of the whole batch at once: a chunk is a unit of memory, not of the
    loss. On several devices, shard C, not the number of chunks.
    """
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so no barrier is needed.
    encode_again = jax.checkpoint(encode, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)

    def encode_all(params: Pytree, sums: Pytree, chunked: Pytree) -> tuple[Pytree, Pytree]:
        if jax.tree.leaves(chunked)[0].shape[0] == 1:
            # A single chunk is the whole batch: encoding it twice saves nothing. No loop either: JAX would
            # hoist loop-invariant values, such as all gathered weights of a frozen model, and keep them.
            vectors, more = encode(params, jax.tree.map(lambda x: x[0], chunked))
            return jax.tree.map(jnp.add, sums, more), vectors

        def body(sums: Pytree, chunk: Pytree) -> tuple[Pytree, Pytree]:
            vectors, more = encode_again(params, chunk)
            return jax.tree.map(jnp.add, sums, more), vectors

        sums, vectors = jax.lax.scan(body, sums, chunked)
        return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), vectors)

    def total(params: Pytree, *chunked: Pytree) -> tuple[jax.Array, Pytree]:
        first = jax.tree.map(lambda x: x[0], chunked[0])
        _, shapes = jax.eval_shape(encode, params, first)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        embedded = []
        for chunks in chunked:
            sums, vectors = encode_all(params, sums, chunks)
            embedded.append(vectors)
        return loss(sums, *embedded)

    return jax.value_and_grad(total, has_aux=True)
