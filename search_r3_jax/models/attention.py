"""Grouped-query attention over several key/value blocks under one softmax, on one of two backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from search_r3_jax.models.kv_block import EMPTY_POSITION, Attend

Backend = Literal["xla", "splash"]


def make_attention(
    backend: Backend,
    positions_bt: jax.Array,
    segments_bt: jax.Array | None,
    contexts: Sequence[tuple[jax.Array, jax.Array | None]],
    context_segments_bt: jax.Array | None,
    *,
    window: int = 0,
) -> Attend:
    """Attention for one text, with its masks computed once for all layers; `window` 0 is unlimited.

    `contexts` are the `(positions [b,S], segments [b,S])` of the context blocks.
    """
    masks = [
        *(
            visibility(positions_bt, positions, context_segments_bt, segments, window=window)
            for positions, segments in contexts
        ),
        visibility(positions_bt, positions_bt, segments_bt, segments_bt, window=window),
    ]
    # The kernel works on tiles of 128 queries; a single new token would waste one.
    if backend == "splash" and positions_bt.shape[1] > 1:
        # Imported here: it loads Pallas, which the other backend does not need.
        from search_r3_jax.models.splash import make_splash_attention

        return make_splash_attention(masks)
    return lambda q, keys_values: attend(
        q, [(k, v, mask) for (k, v), mask in zip(keys_values, masks, strict=True)]
    )


def visibility(
    query_positions_bt: jax.Array,
    key_positions_bs: jax.Array,
    query_segments_bt: jax.Array | None = None,
    key_segments_bs: jax.Array | None = None,
    *,
    window: int = 0,
) -> jax.Array:
    """Mask [b,T·share,S] of the keys that each query sees.

    A key must exist, be no later than the query and within the window before it, and share its segment.
    """
    rows = key_positions_bs.shape[0]
    queries = query_positions_bt.reshape(rows, -1)[:, :, None]
    keys = key_positions_bs[:, None, :]
    mask = (keys != EMPTY_POSITION) & (keys <= queries)
    if window > 0:
        mask &= keys > queries - window
    if query_segments_bt is not None and key_segments_bs is not None:
        mask &= query_segments_bt.reshape(rows, -1)[:, :, None] == key_segments_bs[:, None, :]
    return mask


def attend(q_btnh: jax.Array, blocks: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Attention output [B,T,N,H] over all blocks `(keys [b,S,K,H], values, mask [b,T·share,S])`.

    The queries are already divided by √H. Rows that share a block are folded into its query axis, so a shared
    prompt is read once and not copied, unless the copies are small compared with the scores.
    """
    B, T, N, H = q_btnh.shape
    K = blocks[0][0].shape[2]
    if len(blocks) > 1 and T * N >= K * H:
        blocks = [_concatenated(blocks, B, T)]
    q_bkrth = jnp.moveaxis(q_btnh.reshape(B, T, K, N // K, H), 1, 3)
    scores = []
    for keys, _, mask in blocks:
        rows, S = keys.shape[:2]
        # Arranged as a batched matrix product: on a CPU two to three times as fast as the same einsum.
        block_scores = jnp.matmul(
            _folded(q_bkrth, rows), jnp.transpose(keys, (0, 2, 3, 1)), preferred_element_type=jnp.float32
        )
        visible = mask.reshape(B, T, S)[:, None, None]
        block_scores = _unfolded(block_scores, q_bkrth.shape[:4])
        scores.append(jnp.where(visible, block_scores, jnp.finfo(jnp.float32).min))
    # Weights and sums stay in float32, as in the kernel: only the result is rounded.
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    output_bkrth = jnp.zeros(q_bkrth.shape, jnp.float32)
    start = 0
    for keys, values, _ in blocks:
        rows, S = keys.shape[:2]
        mixed = jnp.matmul(
            _folded(weights[..., start : start + S], rows), jnp.transpose(values, (0, 2, 1, 3))
        )
        output_bkrth += _unfolded(mixed, q_bkrth.shape[:4])
        start += S
    return jnp.moveaxis(output_bkrth, 3, 1).reshape(B, T, N, H).astype(q_btnh.dtype)


def _concatenated(
    blocks: Sequence[tuple[jax.Array, jax.Array, jax.Array]], B: int, T: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All blocks as one block of B rows: one softmax over one array instead of a merge of parts."""
    keys, values = (
        jnp.concatenate([jnp.repeat(block[i], B // len(block[i]), axis=0) for block in blocks], axis=1)
        for i in (0, 1)
    )
    return keys, values, jnp.concatenate([mask.reshape(B, T, -1) for _, _, mask in blocks], axis=-1)


def _folded(x_bkrtx: jax.Array, rows: int) -> jax.Array:
    """[B,K,R,T,X] → [rows,K,share·R·T,X]: rows of one block one after another."""
    B, K, R, T, X = x_bkrtx.shape
    return jnp.moveaxis(x_bkrtx.reshape(rows, B // rows, K, R * T, X), 1, 2).reshape(rows, K, -1, X)


def _unfolded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[rows,K,share·R·T,X] → [B,K,R,T,X], `shape` being [B,K,R,T]."""
    B, K, R, T = shape
    rows, X = x.shape[0], x.shape[-1]
    return jnp.moveaxis(x.reshape(rows, K, B // rows, R, T, X), 2, 1).reshape(B, K, R, T, X)
