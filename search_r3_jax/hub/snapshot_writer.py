"""Writer of a run's snapshots: beside each checkpoint, the parameters alone that an index is built from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from search_r3_jax.hub.checkpoint_integrity import write_checksums
from search_r3_jax.hub.checkpoint_reader import latest_checkpoint
from search_r3_jax.hub.snapshot_reader import (
    as_snapshot,
    pinned_snapshots,
    snapshot_folder,
    snapshot_steps,
)

POLL_SECONDS = 0.05
_REMOVED = ".removed"


class _NoCheckpointError(Exception):
    """The checkpoint of a snapshot was not written; whoever writes checkpoints raises why."""


class SnapshotWriter:
    """Saves snapshots asynchronously; keeps the newest and those that a reader has pinned.

    A snapshot is published only after the checkpoint of its step: a resumed run has every step that an index
    was built from. An error in the background is raised by the next call.
    """

    def __init__(self, run: Path, dtype: jnp.dtype, *, has_checkpoint: Callable[[int], bool]):
        """`has_checkpoint` blocks until a step's checkpoint is committed, or has failed.

        Snapshots later than the newest checkpoint, and what was left half-written, are deleted.
        """
        self._run, self._dtype, self._has_checkpoint = run, dtype, has_checkpoint
        self._folder = snapshot_folder(run)
        self._saving: int | None = None
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if not path.name.isdigit():
                    shutil.rmtree(path, ignore_errors=True)
            newest = latest_checkpoint(run)
            discard_snapshots_from(run, 0 if newest is None else newest + 1)
        # The checkpoint of the same step is saved meanwhile: barriers need other names.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="snapshot")
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=barriers),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._before_publication),
            multiprocessing_options=barriers,
        )

    def save(self, step: int, params: nnx.State) -> None:
        """Begin to save one step's trainable parameters, after the previous snapshot is published.

        Every process calls it and writes its own shards.
        """
        self.wait()
        self._saving = step
        rounded = nnx.to_pure_dict(as_snapshot(params, self._dtype))
        self._checkpointer.save(self._folder / str(step), args=ocp.args.StandardSave(rounded), force=True)

    @property
    def saving(self) -> int | None:
        """The step that was saved last."""
        return self._saving

    def check(self) -> None:
        """Raise an error of a background save."""
        with suppress(_NoCheckpointError):
            self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Wait until the last snapshot is published, then delete those that nobody needs."""
        with suppress(_NoCheckpointError):
            self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            kept = {*snapshot_steps(self._run)[-1:], *pinned_snapshots(self._run)}
            for step in snapshot_steps(self._run):
                if step not in kept:
                    _remove(self._folder / str(step))

    def close(self) -> None:
        """Wait for the last snapshot and release the checkpointer."""
        self.wait()
        self._checkpointer.close()

    def _before_publication(self) -> None:
        # Orbax calls this in process 0, in the background, after all files of all processes are written and
        # before it renames the folder.
        step = self._saving
        if step is None or not self._has_checkpoint(step):
            raise _NoCheckpointError
        for folder in self._folder.glob(f"{step}.*"):
            write_checksums(folder)


def wait_for_folder(folder: Path, in_progress: Callable[[], bool]) -> bool:
    """Block until a folder is there, or nobody is making it any more; returns whether it is there."""
    while not folder.is_dir():
        if not in_progress():
            # It may have come since.
            return folder.is_dir()
        time.sleep(POLL_SECONDS)
    return True


def discard_snapshots_from(run: Path, first: int) -> None:
    """Delete the snapshots of `first` and of later steps."""
    for step in snapshot_steps(run):
        if step >= first:
            _remove(snapshot_folder(run) / str(step))


def _remove(folder: Path) -> None:
    # Renamed first: a reader finds all of a snapshot or none.
    aside = folder.with_name(f"{_REMOVED}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
