"""Where a training step's arrays lie on a mesh: the batch, the state and the activations; a mesh of None is one device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.data.pipeline import ROW_FIELDS, PairBatch
from search_r3_jax.mesh import BATCH_AXES, axis_size, param_sharding

# What one device takes of the head's logits at a time.
HEAD_STATES, HEAD_COLUMNS = 256, 16384
# Of arrays [C,R,T].
ROWS = PartitionSpec(None, BATCH_AXES)


def put_batch(batch: PairBatch, mesh: Mesh | None) -> PairBatch:
    """A batch on its mesh: each chunk's rows across `BATCH_AXES`, padded to share them equally, all else everywhere.

    Every process gives the same batch, and its devices are handed no rows but their own.
    """
    if mesh is None:
        return batch

    def put(path: tuple[Any, ...], x: np.ndarray) -> jax.Array:
        spec = ROWS if path[-1].name in ROW_FIELDS else PartitionSpec()
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return jax.tree_util.tree_map_with_path(put, batch.padded(axis_size(mesh, BATCH_AXES)))


def params_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Where parameters lie, in their own structure."""

    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return param_sharding(tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), mesh)

    return jax.tree_util.tree_map_with_path(of, params)


def head_chunks(vocab_size: int, mesh: Mesh | None) -> tuple[int, int]:
    """How many states, and how many columns of the vocabulary, the losses on the head take at a time; each device its part of them."""
    if mesh is None:
        return HEAD_STATES, HEAD_COLUMNS
    # The head's weights are gathered once for each chunk of states, and a slice of a vocabulary that is cut already would be gathered too.
    return HEAD_STATES * axis_size(mesh, BATCH_AXES), HEAD_COLUMNS if mesh.shape["tensor"] == 1 else vocab_size
