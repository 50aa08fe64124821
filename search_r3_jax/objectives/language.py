"""Token log-probabilities in chunks, and the cross-entropy built from them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_log_probs(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_md: jax.Array,
    targets_m: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """`(log-probabilities [M], entropies [M])` float32 in nats of the targets under softmax(logits/temperature).

    M is cut into chunks that are recomputed in the backward pass: at most `chunk × V` logits exist at a time.
    """
    M, D = hidden_md.shape
    chunk = min(chunk, M)
    padding = -M % chunk
    hidden = jnp.pad(hidden_md, ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(targets_m, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(hidden_cd: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs_cv = jax.nn.log_softmax(logits_of(hidden_cd) / temperature, axis=-1)
        picked = jnp.take_along_axis(log_probs_cv, targets_c[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_probs_cv) * log_probs_cv, axis=-1)
        return picked, jax.lax.stop_gradient(entropy)

    def body(_: None, chunk_arguments: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, one_chunk(*chunk_arguments)

    _, (log_probs, entropies) = jax.lax.scan(body, None, (hidden, targets))
    return log_probs.reshape(-1)[:M], entropies.reshape(-1)[:M]


def cross_entropy(log_probs_m: jax.Array, mask_m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(sum, count)` of −log p over the masked tokens, in nats."""
    weight = mask_m.astype(jnp.float32)
    return -jnp.sum(log_probs_m * weight), jnp.sum(weight)
