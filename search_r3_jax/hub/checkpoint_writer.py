"""Writer of a run's Orbax checkpoints, also used to resume from them."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from search_r3_jax.errors import UserError, not_written
from search_r3_jax.hub.checkpoint_integrity import verify_checkpoint, write_checksums
from search_r3_jax.hub.checkpoint_reader import (
    META,
    OPTIMIZER,
    PARAMS,
    SCORE,
    abstract_arrays,
    best_step,
    checkpoint_folder,
    checkpoint_scores,
    checkpoint_steps,
    fill_state,
)
from search_r3_jax.hub.snapshot_reader import pinned_snapshots, snapshot_folder, snapshot_steps
from search_r3_jax.hub.snapshot_writer import SnapshotWriter, wait_for_folder

ARRAYS, EMPTY = "arrays", "empty_arrays"
TEMPORARY = ".orbax-checkpoint-tmp"
logger = logging.getLogger(__name__)


class RestoredCheckpoint(NamedTuple):
    """Content of a checkpoint: trainable parameters, optimiser state, and loop state as JSON and arrays."""

    params: nnx.State
    optimizer: Any
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


class CheckpointWriter:
    """Saves steps asynchronously; keeps the newest `keep`, every `keep_every`-th and the best.

    Pinned steps that have no snapshot are kept too. An error in the background is raised by the next
    call, as a UserError.
    """

    def __init__(
        self, run: Path, *, keep: int = 3, keep_every: int = 0, snapshot_dtype: jnp.dtype | None = None
    ):
        """With `snapshot_dtype`, each step also gets a snapshot in that dtype (`SnapshotWriter`)."""
        self._run, self._folder = run, checkpoint_folder(run)
        self._scores = checkpoint_scores(run)
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_PreservationPolicy(run, keep, keep_every, self._scores),
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
            # Removes a partial step that a killed trainer left.
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._snapshots = (
            None
            if snapshot_dtype is None
            else SnapshotWriter(run, snapshot_dtype, has_checkpoint=self._has_checkpoint)
        )

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: nnx.State,
        optimizer: Any,
        meta: Mapping[str, Any],
        *,
        arrays: Mapping[str, np.ndarray] | None = None,
        score: float | None = None,
    ) -> None:
        """Begin to save one step after the previous one is committed.

        The step with the highest score is the best. See `RestoredCheckpoint` for the content. Raises
        UserError when the previous save failed.
        """
        self.wait()
        if score is not None:
            self._scores[step] = score
        arrays = arrays or {}
        # Orbax refuses arrays without elements.
        empty = {
            name: [list(array.shape), str(array.dtype)] for name, array in arrays.items() if not array.size
        }
        items: dict[str, Any] = {
            PARAMS: ocp.args.StandardSave(nnx.to_pure_dict(params)),
            OPTIMIZER: ocp.args.StandardSave(optimizer),
            # A copy: it is written later, while training continues.
            META: ocp.args.JsonSave(copy.deepcopy({**meta, SCORE: score, EMPTY: empty})),
        }
        full = {name: array for name, array in arrays.items() if array.size}
        if full:
            items[ARRAYS] = ocp.args.StandardSave(full)
        self._saving = step
        self._raising(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))
        self.save_snapshot(step, params)

    def save_snapshot(self, step: int, params: nnx.State) -> None:
        """Begin to save the snapshot of a step whose checkpoint is committed or being saved.

        Does nothing for a run without snapshots. Raises UserError when the previous one failed.
        """
        snapshots = self._snapshots
        if snapshots is not None:
            self._raising_of_snapshot(lambda: snapshots.save(step, params))

    def restore(self, step: int, params: nnx.State, optimizer: Any) -> RestoredCheckpoint:
        """Restore a step, shaped and sharded like the given parameters and optimiser state.

        Raises UserError when they do not fit.
        """
        targets: dict[str, Any] = {
            PARAMS: ocp.args.StandardRestore(abstract_arrays(nnx.to_pure_dict(params))),
            OPTIMIZER: ocp.args.StandardRestore(abstract_arrays(optimizer)),
            META: ocp.args.JsonRestore(),
        }
        if (self._folder / str(step) / ARRAYS).is_dir():
            targets[ARRAYS] = ocp.args.StandardRestore()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**targets))
        except Exception as error:
            # Orbax reports a mismatch of trees by many types of exceptions.
            raise UserError(
                f"{self._folder / str(step)}: does not fit this run ({_first_line(error)}); give another "
                "--run"
            ) from error
        meta = restored[META]
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in meta.pop(EMPTY, {}).items()}
        if ARRAYS in targets:
            arrays |= {name: np.asarray(array) for name, array in restored[ARRAYS].items()}
        return RestoredCheckpoint(fill_state(params, restored[PARAMS]), restored[OPTIMIZER], meta, arrays)

    def check(self) -> None:
        """Raise an error of a background save; call it between steps."""
        self._raising(self._manager.check_for_errors)
        if self._snapshots is not None:
            self._raising_of_snapshot(self._snapshots.check)

    def wait(self) -> None:
        """Wait until every save is committed; raises an error of a background save."""
        self._raising(self._manager.wait_until_finished)
        if self._snapshots is not None:
            self._raising_of_snapshot(self._snapshots.wait)
        self.check()

    def close(self) -> None:
        """Wait for the saves and release the managers."""
        with ExitStack() as closing:
            closing.callback(self._manager.close)
            if self._snapshots is not None:
                closing.callback(self._snapshots.close)
            self.wait()

    def _has_checkpoint(self, step: int) -> bool:
        """Block until a step is committed or has failed; returns which."""
        return wait_for_folder(self._folder / str(step), self._manager.is_saving_in_progress)

    def _write_checksums(self) -> None:
        # Orbax calls this after all files are written and before it renames the folder: every published step
        # has checksums.
        if jax.process_index() == 0:
            for folder in self._folder.glob(f"{self._saving}{TEMPORARY}*"):
                write_checksums(folder)

    def _raising(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            raise not_written(
                f"{self._folder}: step {self._saving}",
                error,
                "make room, then the same command goes on from the step before",
            ) from error

    def _raising_of_snapshot(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            folder, step = snapshot_folder(self._run), self._snapshots.saving if self._snapshots else None
            raise not_written(
                f"{folder}: step {step}", error, "make room, then the same command goes on and writes it"
            ) from error


def latest_valid_checkpoint(run: Path) -> int | None:
    """The newest undamaged step, the same on all processes; None without any step.

    Damaged steps are renamed to `damaged-<step>` and logged. Raises UserError when all steps are damaged.
    """
    valid = newest_valid_checkpoint(run) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        # Collectives carry numbers: −1 is no step.
        sent = np.array(-1 if valid is None else valid, np.int32)
        received = int(multihost_utils.broadcast_one_to_all(sent))
        valid = None if received < 0 else received
    return valid


def newest_valid_checkpoint(run: Path) -> int | None:
    """`latest_valid_checkpoint`, in this process alone."""
    steps = checkpoint_steps(run)
    for step in reversed(steps):
        folder = checkpoint_folder(run) / str(step)
        damage = verify_checkpoint(folder)
        if damage is None:
            return step
        aside = folder.with_name(f"damaged-{step}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        logger.info(
            f"checkpoint {step} is damaged: {damage}; it is renamed to {aside.name}; the one before is used"
        )
    if steps:
        raise UserError(f"{checkpoint_folder(run)}: all checkpoints are damaged; give another --run")
    return None


class _PreservationPolicy:
    """The checkpoints that Orbax keeps.

    Orbax's own policies forget the scores when a run is reopened.
    """

    def __init__(self, run: Path, keep: int, keep_every: int, scores: dict[int, float]):
        self._run, self._keep, self._keep_every, self._scores = run, keep, keep_every, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(info.step for info in checkpoints)
        best = best_step({step: score for step, score in self._scores.items() if step in steps})
        every = {step for step in steps if self._keep_every and step and step % self._keep_every == 0}
        # A run of an older version pins steps that have no snapshot: their checkpoint is read in its place.
        pinned = set(pinned_snapshots(self._run)).difference(snapshot_steps(self._run))
        kept = {*steps[-self._keep :], best, *every, *pinned}
        return [info.step in kept for info in checkpoints]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
