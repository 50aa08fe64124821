"""Prefills prompts into the key/value cache in chunks, which bounds the memory of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.kv_block import EMPTY_POSITION, KVBlock


def prefill(
    decoder: Decoder,
    ids_bt: jax.Array,
    positions_bt: jax.Array,
    *,
    chunk: int,
    contexts: Sequence[KVBlock] = (),
    adapters: bool = True,
) -> tuple[jax.Array, KVBlock]:
    """Hidden states [B,T,D] and the block [L,B,T,K,H] of prompts, equal to those of a single pass.

    `chunk` is in tokens; 0, or a prompt no longer than it, is one pass. Padding has position
    `EMPTY_POSITION`.
    """
    B, T = ids_bt.shape
    if chunk <= 0 or chunk >= T:
        return decoder(ids_bt, positions_bt, contexts=contexts, adapters=adapters)
    padding = -T % chunk
    chunks = (T + padding) // chunk
    ids_cbt = jnp.moveaxis(jnp.pad(ids_bt, ((0, 0), (0, padding))).reshape(B, chunks, chunk), 1, 0)
    positions = jnp.pad(positions_bt, ((0, 0), (0, padding)), constant_values=EMPTY_POSITION)
    positions_cbt = jnp.moveaxis(positions.reshape(B, chunks, chunk), 1, 0)
    config = decoder.config
    empty = jnp.zeros(
        (config.layers, B, T + padding, config.kv_heads, config.head_dim), decoder.compute_dtype
    )
    cache = KVBlock(empty, empty, jnp.full((B, T + padding), EMPTY_POSITION, jnp.int32))

    def body(cache: KVBlock, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[KVBlock, jax.Array]:
        number, ids, positions = part
        hidden, new = decoder(ids, positions, contexts=[*contexts, cache], adapters=adapters)
        at = number * chunk
        grown = KVBlock(
            jax.lax.dynamic_update_slice_in_dim(cache.keys, new.keys, at, axis=2),
            jax.lax.dynamic_update_slice_in_dim(cache.values, new.values, at, axis=2),
            jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, at, axis=1),
        )
        return grown, hidden

    cache, hidden_cbtd = jax.lax.scan(body, cache, (jnp.arange(chunks), ids_cbt, positions_cbt))
    hidden = jnp.moveaxis(hidden_cbtd, 0, 1).reshape(B, T + padding, -1)[:, :T]
    return hidden, KVBlock(cache.keys[:, :, :T], cache.values[:, :, :T], cache.positions[:, :T])
