"""Builds an index of the requested kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from search_r3_jax.retrieval.index.device import DeviceIndex
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import IndexKind, LocalIndex
from search_r3_jax.retrieval.index.scann import ScannIndex, scann_available
from search_r3_jax.vectors import require_directions

# A few megabytes at the usual dimensions: the vectors may be memory-mapped.
_CHECKED_ROWS = 4096


def build_index(
    kind: IndexKind, vectors: np.ndarray, ids: Sequence[str], version: int, *, threads: int = 0
) -> LocalIndex:
    """Build an index over unit vectors [N,E]; the result's `kind` says which it is.

    `auto` is ScaNN where installed, else exact. Raises UserError naming the first document whose vector is
    not finite or zero.
    """
    for start in range(0, len(vectors), _CHECKED_ROWS):
        chunk = vectors[start : start + _CHECKED_ROWS]
        require_directions(chunk, lambda row, start=start: f"document {ids[start + row]}")
    resolved = resolve_kind(kind)
    if resolved == "scann":
        return ScannIndex.build(vectors, ids, version, threads=threads)
    if resolved == "device":
        return DeviceIndex(vectors, ids, version)
    return ExactIndex(vectors, ids, version)


def resolve_kind(kind: IndexKind) -> Literal["exact", "scann", "device"]:
    """Resolve `auto` on this machine; raises ValueError on an unknown kind."""
    if kind == "auto":
        return "scann" if scann_available() else "exact"
    if kind not in ("exact", "scann", "device"):
        raise ValueError(f"index kind {kind!r} is none of exact, scann, device, auto")
    return kind
