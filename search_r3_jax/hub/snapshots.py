"""Orbax checkpoints of a run: written by a trainer, read by the indexer and by everything that takes a run as a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from search_r3_jax.config import RunConfig, Step, config_from_dict
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_text

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"
SCORE = "score"


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints (absolute: Orbax asks for it)."""
    return (run / "checkpoints").absolute()


class SnapshotWriter:
    """Saves steps asynchronously and keeps the newest `keep`, the best and what is pinned.

    An error of a background save is raised by the next call.
    """

    def __init__(self, run: Path, *, keep: int = 3):
        self._scores = _scores(run)
        policy = _Needed(run, keep, self._scores)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(checkpoint_folder(run), options=options)

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def save(self, step: int, params: nnx.State, optimizer: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """Begin to save one step: trainable parameters, optimiser state, what else decides the next step; the highest score is the best."""
        self._manager.check_for_errors()
        if score is not None:
            self._scores[step] = score
        items = {
            PARAMS: ocp.args.StandardSave(nnx.to_pure_dict(params)),
            OPTIMIZER: ocp.args.StandardSave(optimizer),
            META: ocp.args.JsonSave({**meta, SCORE: score}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, params: nnx.State, optimizer: Any) -> tuple[nnx.State, Any, dict[str, Any]]:
        """`(params, optimizer, meta)` of a step, shaped like the ones given."""
        targets = {
            PARAMS: ocp.args.StandardRestore(_abstract(nnx.to_pure_dict(params))),
            OPTIMIZER: ocp.args.StandardRestore(_abstract(optimizer)),
            META: ocp.args.JsonRestore(),
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**targets))
        return _filled(params, found[PARAMS]), found[OPTIMIZER], found[META]

    def wait(self) -> None:
        """Until every save has been committed; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for the saves and release the manager."""
        self.wait()
        self._manager.close()


class _Needed:
    """Which checkpoints Orbax keeps: `keep` of the newest, the best, and those being read.

    Its own policies forget the scores when a run is opened again.
    """

    def __init__(self, run: Path, keep: int, scores: dict[int, float]):
        self._run, self._keep, self._scores = run, keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(info.step for info in checkpoints)
        best = _best({step: score for step, score in self._scores.items() if step in steps})
        kept = {*steps[-self._keep :], best, *pinned_snapshots(self._run)}
        return [info.step in kept for info in checkpoints]


def pin_snapshot(run: Path, reader: str, step: int | None) -> None:
    """Keep a step from being deleted while `reader` needs it, in place of the one it named before; None lets go of that."""
    file = run / "pins" / reader
    if step is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    write_text(file, f"{step}\n")


def pinned_snapshots(run: Path) -> list[int]:
    """The steps that readers need."""
    steps = []
    for file in (run / "pins").glob("[!.]*"):
        try:
            steps.append(int(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            # A reader has just let go.
            continue
    return steps


def _scores(run: Path) -> dict[int, float]:
    """The scores of the committed steps that have one."""
    folder = checkpoint_folder(run)
    # Orbax publishes a step by renaming its temporary directory to the bare number.
    files = [file for file in folder.glob(f"*/{META}/metadata") if file.parts[-3].isdigit()] if folder.is_dir() else []
    scores = {int(file.parts[-3]): json.loads(file.read_text(encoding="utf-8")).get(SCORE) for file in files}
    return {step: score for step, score in scores.items() if score is not None}


def _best(scores: dict[int, float]) -> int | None:
    return max(scores, key=lambda step: (scores[step], step), default=None)


def latest_snapshot(run: Path) -> int | None:
    """The newest committed step of a run, or None; sees what another process has committed by now."""
    folder = checkpoint_folder(run)
    if not folder.is_dir():
        return None
    # Orbax publishes a step by renaming its temporary directory to the bare number.
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return max(steps, default=None)


def best_snapshot(run: Path) -> int | None:
    """The committed step with the highest score, the newest of equals; None where no step has one."""
    return _best(_scores(run))


def chosen_snapshot(run: Path, step: Step) -> int:
    """The step that is meant: a number, None for the newest, `best`; raises UserError when there is none."""
    found = step if isinstance(step, int) else latest_snapshot(run) if step is None else best_snapshot(run)
    if found is None and step is None:
        raise UserError(f"{run}: checkpoints: none yet; wait for the first one, or give the model that the run starts from")
    if found is None:
        raise UserError(
            f"{run}: no checkpoint was evaluated while it was trained, so none is the best; leave --step out or give its number"
        )
    return found


def read_snapshot(run: Path, step: int, params: nnx.State) -> nnx.State:
    """The trainable parameters of one step, shaped like `params`; raises UserError when the step is not there."""
    folder = checkpoint_folder(run) / str(step) / PARAMS
    if not folder.is_dir():
        raise UserError(f"{checkpoint_folder(run)}: step {step}: no such checkpoint; the newest is {latest_snapshot(run)}")
    with ocp.StandardCheckpointer() as checkpointer:
        return _filled(params, checkpointer.restore(folder, _abstract(nnx.to_pure_dict(params))))


def read_run(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a run directory and the whole record; raises UserError when it is not one."""
    file = path / "config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return config_from_dict(RunConfig, record["config"]), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the config of a run ({error}); give the folder that sft or rl wrote to") from None


def start_of(run: Path, record: dict[str, Any]) -> str:
    """The model that a run starts from; another run is recorded relative to this one, so that both can move together."""
    start = record.get("start")
    return record["config"]["model"] if start is None else str((run / start).resolve())


def start_step_of(record: dict[str, Any]) -> int | None:
    """The checkpoint of the run that a run starts from; None where it starts from no run, or an older record names none."""
    return record.get("start_step")


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)), tree)


def _filled(params: nnx.State, pure: Any) -> nnx.State:
    filled = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(filled, pure)
    return filled
