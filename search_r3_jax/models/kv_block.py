"""Blocks of keys and values that attention reads, and the signature of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

EMPTY_POSITION = -1
"""Position of a key that does not exist: padding, or a cache slot not yet written."""


class KVBlock(NamedTuple):
    """Keys and values that query rows can see; b rows serve B = b · share consecutive query rows.

    `keys`, `values` [b,S,K,H], with a leading L for the whole decoder; `positions` [b,S] int32,
    `EMPTY_POSITION` where empty; `segments` [b,S] int32 or None: a query sees only keys of its context
    segment, for several prompt prefixes in one block.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None


Attend = Callable[[jax.Array, Sequence[tuple[jax.Array, jax.Array]]], jax.Array]
"""Output [B,T,N,H] of queries [B,T,N,H], already divided by √H, over one layer's `(keys, values)` [b,S,K,H]:
the context blocks, then those of the text itself."""
