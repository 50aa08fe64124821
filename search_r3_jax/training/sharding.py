"""Where a training step's arrays lie on a mesh: the batch, the state and the activations; a mesh of None is one device."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.data.pipeline import ROW_FIELDS, PairBatch, TextChunks
from search_r3_jax.mesh import BATCH_AXES, param_sharding

# Of arrays [C,R,T].
ROWS = PartitionSpec(None, BATCH_AXES)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: PairBatch, mesh: Mesh | None) -> PairBatch:
    """A batch on its mesh: each chunk's rows across `BATCH_AXES`, padded to share them equally, all else everywhere.

    Every process gives the same batch, and its devices are handed no rows but their own.
    """
    if mesh is None:
        return batch

    def put(x: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    texts = TextChunks(*[rows if name in ROW_FIELDS else everywhere for name in TextChunks._fields])
    where = PairBatch(texts, texts, *[everywhere] * (len(PairBatch._fields) - 2))
    return jax.tree.map(put, batch.padded(row_shards(mesh)), where)


def params_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Where parameters lie, in their own structure."""

    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return param_sharding(tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), mesh)

    return jax.tree_util.tree_map_with_path(of, params)


def across(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The first axis lies over `BATCH_AXES`, all others are whole."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def everywhere(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Every device holds all of it."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def read_tokens(hidden_rtd: jax.Array, at_n: jax.Array, mesh: Mesh | None) -> jax.Array:
    """States [N,D] at flat positions of the rows."""
    return hidden_rtd.reshape(-1, hidden_rtd.shape[-1])[at_n]
