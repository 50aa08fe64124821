"""Reader of a run's snapshots: a checkpoint's trainable parameters alone, from which an index is built."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_text
from search_r3_jax.hub.checkpoint_integrity import verify_checkpoint
from search_r3_jax.hub.checkpoint_reader import abstract_arrays, committed_steps, fill_state


def snapshot_folder(run: Path) -> Path:
    """The snapshot folder of a run, absolute because Orbax requires it."""
    return (run / "snapshots").absolute()


def snapshot_dtype(config: RunConfig) -> jnp.dtype:
    """The dtype of a run's snapshots."""
    # Under full fine-tuning the decoder rounds each parameter, norms and biases too, to the compute dtype
    # where it uses it; rounded once before, the parameters give the same vectors. Adapters are merged into
    # the base in float32, so they are kept so.
    return jnp.dtype("float32" if config.lora.rank else config.compute_dtype)


def as_snapshot(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Trainable parameters in the dtype of a snapshot, each sharded as before."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def snapshot_steps(run: Path) -> list[int]:
    """The steps that have a snapshot, ascending; includes those that another process has committed."""
    return committed_steps(snapshot_folder(run))


def latest_snapshot(run: Path) -> int | None:
    """The newest step that has a snapshot, or None."""
    return max(snapshot_steps(run), default=None)


def has_snapshot(run: Path, step: int) -> bool:
    """Whether a step has a snapshot that is not damaged; reads all of it."""
    folder = snapshot_folder(run) / str(step)
    return folder.is_dir() and verify_checkpoint(folder) is None


def read_snapshot(run: Path, step: int, params: nnx.State) -> nnx.State:
    """The trainable parameters of one step; shapes, dtypes and shardings are those of `params`.

    Raises UserError when the snapshot is missing or damaged.
    """
    folder = snapshot_folder(run) / str(step)
    if not folder.is_dir():
        raise UserError(
            f"{folder.parent}: step {step}: no such snapshot; the newest is {latest_snapshot(run)}"
        )
    damage = verify_checkpoint(folder)
    if damage:
        raise UserError(
            f"{folder}: is damaged: {damage}; remove it, and the trainer, started again, writes that of its "
            "newest checkpoint"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return fill_state(params, checkpointer.restore(folder, abstract_arrays(nnx.to_pure_dict(params))))


def pin_snapshots(run: Path, reader: str, steps: Collection[int]) -> None:
    """Protect steps from deletion for `reader`, in place of the steps it pinned before; none unpins all."""
    file = run / "pins" / reader
    if not steps:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    write_text(file, " ".join(str(step) for step in sorted(steps)) + "\n")


def pinned_snapshots(run: Path) -> list[int]:
    """The steps that readers have pinned."""
    steps = []
    for file in (run / "pins").glob("[!.]*"):
        try:
            steps += [int(step) for step in file.read_text(encoding="utf-8").split()]
        except (FileNotFoundError, ValueError):
            # A reader has just removed its pins.
            continue
    return steps
