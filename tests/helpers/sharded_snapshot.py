"""A program for tests: processes that share a model save it with snapshots in bfloat16, and read one back;
prints what there is and what differs, as JSON.

Arguments: the model's folder, the run's folder, process index, number of processes, port of the coordinator.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.jax_processes import joined
from jax.sharding import NamedSharding, PartitionSpec

from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.hub.snapshot_reader import as_snapshot, pin_snapshots, read_snapshot, snapshot_steps
from search_r3_jax.mesh import make_mesh, placed
from search_r3_jax.models.lora import trainable_filter


def main(folder: str, place: str) -> None:
    run, dtype = Path(place), jnp.dtype("bfloat16")
    mesh = make_mesh(fsdp=4)
    shared = load_model(folder, mesh=mesh, compute_dtype="bfloat16").decoder
    alone = load_model(folder, compute_dtype="bfloat16").decoder
    start = nnx.state(alone, trainable_filter(alone))
    shardings = jax.tree.map(lambda x: x.sharding, nnx.state(shared, trainable_filter(shared)))

    def params_of(step: int) -> nnx.State:
        """The parameters of a step on the devices of all processes."""
        generator = np.random.default_rng(step)
        moved = jax.tree.map(lambda x: x + 0.02 * generator.normal(size=x.shape).astype(np.float32), start)
        return jax.tree.map(placed, moved, shardings)

    count = placed(np.zeros(1), NamedSharding(mesh, PartitionSpec()))
    writer = CheckpointWriter(run, keep=2, snapshot_dtype=dtype)
    if jax.process_index() == 0:
        pin_snapshots(run, "reader", [2])
    for step in (0, 2, 4, 6):
        # All together, and the next one as soon as the last is there.
        writer.save(step, params_of(step), {"count": count}, {})
    writer.close()
    expected = as_snapshot(params_of(6), dtype)
    found = read_snapshot(run, 6, expected)
    different = [
        jax.tree_util.keystr(path)
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
        )
        if ours.sharding != theirs.sharding
        or any(
            not np.array_equal(np.asarray(one.data), np.asarray(other.data))
            for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True)
        )
    ]
    report = {
        "snapshots": snapshot_steps(run),
        "checkpoints": checkpoint_steps(run),
        "different": different,
        "shared": any(not x.is_fully_addressable for x in jax.tree.leaves(found)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main(sys.argv[1], sys.argv[2])
