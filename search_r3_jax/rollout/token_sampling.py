"""Samples a token of each row: temperature, top-k, top-p, and a draw robust to rounding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Entropy of a masked column (−inf): e^−10⁴ is 0, and 0 · −inf would be NaN.
LOWEST = -1e4
# Tokens in a block of the vocabulary: about the square root of V needs the fewest random numbers.
BLOCK = 256


class SampledToken(NamedTuple):
    """A `token` [B] int32 a row, its `log_prob` [B] and the `entropy` [B] of its distribution.

    The last two are float32, in nats. Both are of softmax(logits/temperature) over the whole vocabulary,
    whatever top-k and top-p left to choose from: this is what a teacher-forced forward can recompute. (So
    does TRL's trainer; samplers that normalise over the survivors differ from it by the log of the surviving
    probability.)
    """

    token: jax.Array
    log_prob: jax.Array
    entropy: jax.Array


def sample_token(
    logits_bv: jax.Array,
    keys_b: jax.Array,
    step_b: jax.Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> SampledToken:
    """Sample a token of each row from logits [B,V] float32; temperature 0 is greedy.

    Each row has a random key [B] and the number of the token in its row. Its token depends on its logits, key
    and number alone.
    """
    scaled_bv = logits_bv / temperature if temperature > 0 else logits_bv
    log_probs_bv = jax.nn.log_softmax(scaled_bv, axis=-1)
    if temperature == 0:
        token = jnp.argmax(scaled_bv, axis=-1)
    else:
        token = _draw(warp(scaled_bv, top_k=top_k, top_p=top_p), jax.vmap(jax.random.fold_in)(keys_b, step_b))
    token = token.astype(jnp.int32)
    return SampledToken(
        token=token,
        log_prob=jnp.take_along_axis(log_probs_bv, token[:, None], axis=-1)[:, 0],
        entropy=-jnp.sum(jnp.exp(log_probs_bv) * jnp.maximum(log_probs_bv, LOWEST), axis=-1),
    )


def _draw(scores_bv: jax.Array, keys_b: jax.Array) -> jax.Array:
    """Draw a token [B] of softmax(scores) a row by the Gumbel trick: a block of the vocabulary, then a token.

    Two stages take a few hundred random numbers a row instead of V. An inverse transform would be less
    robust: another batch shape changes the last digits of the scores. With the Gumbel trick this changes a
    draw only where the best two sums agree to those digits; in a cumulated probability the change carries
    over to every later token, and changes nearly each draw in the tail.
    """
    B, V = scores_bv.shape
    blocks_bnc = jnp.pad(scores_bv, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf).reshape(B, -1, BLOCK)
    block_scores_bn = jax.nn.logsumexp(blocks_bnc, axis=-1)
    N = block_scores_bn.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (N + BLOCK,)))(keys_b)
    n = jnp.argmax(block_scores_bn + noise[:, :N], axis=-1)
    within_bc = jnp.take_along_axis(blocks_bnc, n[:, None, None], axis=1)[:, 0]
    return n * BLOCK + jnp.argmax(within_bc + noise[:, N:], axis=-1)


def warp(scores_bv: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Mask scores [B,V] with −inf where top-k, then top-p, drops a token, as in `transformers`.

    Top-k 0 and top-p 1 are off. Top-k keeps what ties with the k-th; top-p keeps the fewest best tokens whose
    probability after top-k reaches `top_p`, at least one.
    """
    V = scores_bv.shape[-1]
    if 0 < top_k < V:
        smallest = jax.lax.top_k(scores_bv, top_k)[0][:, -1:]
        scores_bv = jnp.where(scores_bv < smallest, -jnp.inf, scores_bv)
    if top_p < 1:
        rising_bv = jnp.argsort(scores_bv, axis=-1)
        below = jnp.cumsum(
            jax.nn.softmax(jnp.take_along_axis(scores_bv, rising_bv, axis=-1), axis=-1), axis=-1
        )
        dropped = (below <= 1 - top_p) & (jnp.arange(V) < V - 1)
        row = jnp.arange(scores_bv.shape[0])[:, None]
        scores_bv = jnp.where(
            jnp.zeros(scores_bv.shape, bool).at[row, rising_bv].set(dropped), -jnp.inf, scores_bv
        )
    return scores_bv
