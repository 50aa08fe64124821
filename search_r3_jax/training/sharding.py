"""Shardings of a training step's arrays: batch and parameters.

A mesh of None is one device.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.data.pipeline import ROW_FIELDS, PairBatch
from search_r3_jax.mesh import BATCH_AXES, axis_size, map_params

# Of arrays [C,R,T].
ROWS = PartitionSpec(None, BATCH_AXES)


def put_batch(batch: PairBatch, mesh: Mesh | None) -> PairBatch:
    """Place a batch on its mesh, each chunk's rows across `BATCH_AXES`, all else replicated.

    Rows are padded to divide evenly. Every process gives the same batch; each device gets only its rows.
    """
    if mesh is None:
        return batch
    padded = batch.padded(axis_size(mesh, BATCH_AXES))
    return jax.tree.map(
        lambda x, sharding_of: jax.make_array_from_callback(x.shape, sharding_of, x.__getitem__),
        padded,
        batch_shardings(padded, mesh),
    )


def batch_shardings(batch: PairBatch, mesh: Mesh) -> PairBatch:
    """Shardings of a padded batch, in the batch's structure."""

    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return NamedSharding(mesh, ROWS if path[-1].name in ROW_FIELDS else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, batch)


def params_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Shardings of parameters, in their structure."""
    return map_params(lambda _, spec: NamedSharding(mesh, spec), params)
