"""Grouped-query attention over several key/value blocks under one softmax, and rotary positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NOTHING = -1
"""Position of a key that does not exist: padding, or a cache slot not yet written."""


class KVBlock(NamedTuple):
    """Keys and values that some rows can see; b rows serve B = b · share consecutive query rows.

    `keys`, `values` [b,S,K,H] (with a leading L when they stand for the whole decoder); `positions` [b,S] int32, `NOTHING` where empty;
    `segments` [b,S] int32: where given, a query sees only keys of its own context segment (several prompt prefixes in one block).
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None


def rotary_tables(positions_bt: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B,T,H/2] float32 of rotary position embedding (Su et al., arXiv 2104.09864)."""
    frequencies_h = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles_bth = positions_bt[..., None].astype(jnp.float32) * frequencies_h
    return jnp.cos(angles_bth), jnp.sin(angles_bth)


def rotate(x_btnh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of H (the layout of `transformers`), in float32; returns the input's dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def visibility(
    query_positions_bt: jax.Array,
    key_positions_bs: jax.Array,
    query_segments_bt: jax.Array | None = None,
    key_segments_bs: jax.Array | None = None,
) -> jax.Array:
    """Causal mask [b,T·share,S]: keys that exist, stand not later than the query, and share its segment."""
    rows = key_positions_bs.shape[0]
    queries = query_positions_bt.reshape(rows, -1)[:, :, None]
    keys = key_positions_bs[:, None, :]
    mask = (keys != NOTHING) & (keys <= queries)
    if query_segments_bt is not None and key_segments_bs is not None:
        mask &= query_segments_bt.reshape(rows, -1)[:, :, None] == key_segments_bs[:, None, :]
    return mask


def attend(q_btnh: jax.Array, blocks: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Attention output [B,T,N,H] of queries over all blocks `(keys [b,S,K,H], values, mask [b,T·share,S])`; softmax in float32.

    Rows that share a block are folded into its query axis, so a shared prompt is read once and never copied.
    """
    B, T, N, H = q_btnh.shape
    K = blocks[0][0].shape[2]
    R = N // K
    scores = []
    for keys, _, mask in blocks:
        rows = keys.shape[0]
        q = q_btnh.reshape(rows, -1, K, R, H)
        block_scores = jnp.einsum("btkrh,bskh->bkrts", q, keys, preferred_element_type=jnp.float32) * (H**-0.5)
        block_scores = jnp.where(mask[:, None, None], block_scores, jnp.finfo(jnp.float32).min)
        share = B // rows
        scores.append(jnp.moveaxis(block_scores.reshape(rows, K, R, share, T, -1), 3, 1).reshape(B, K, R, T, -1))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_btnh.dtype)
    output = jnp.zeros_like(q_btnh)
    start = 0
    for keys, values, _ in blocks:
        rows, S = keys.shape[:2]
        share = B // rows
        part = weights[..., start : start + S].reshape(rows, share, K, R, T, S)
        mixed = jnp.einsum("bgkrts,bskh->bgtkrh", part, values)
        output += mixed.reshape(B, T, N, H)
        start += S
    return output
