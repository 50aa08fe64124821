"""The embedding head: the final hidden state at `<|embed_token|>`, as a unit vector."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from search_r3_jax.vectors import l2_normalize


class EmbedOutput(NamedTuple):
    """`vectors` [B,E] float32 of unit norm (zeros where not valid) and `valid` [B] bool.

    A row is valid if it has exactly one embed token.
    """

    vectors: jax.Array
    valid: jax.Array


def pool_embedding(hidden_btd: jax.Array, ids_bt: jax.Array, embed_id: int) -> EmbedOutput:
    """Embedding of each row: the state where `ids == embed_id` (method, Model)."""
    at_token = ids_bt == embed_id
    valid = jnp.sum(at_token, axis=-1) == 1
    # A sum over the mask, not argmax: an absent token must not silently mean position 0.
    picked = jnp.einsum(
        "btd,bt->bd", hidden_btd.astype(jnp.float32), (at_token & valid[:, None]).astype(jnp.float32)
    )
    return EmbedOutput(l2_normalize(picked), valid)
