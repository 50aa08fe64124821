"""Reader of a run's Orbax checkpoints, for every command that takes a run as model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from search_r3_jax.config import RunConfig, Step, config_from_dict
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_integrity import verify_checkpoint

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"
SCORE = "score"


def checkpoint_folder(run: Path) -> Path:
    """The checkpoint folder of a run, absolute because Orbax requires it."""
    return (run / "checkpoints").absolute()


def checkpoint_scores(run: Path) -> dict[int, float]:
    """The scores of the committed steps, where a step has one."""
    folder = checkpoint_folder(run)
    # Orbax publishes a step by renaming its temporary directory to the bare number.
    files = (
        [file for file in folder.glob(f"*/{META}/metadata") if file.parts[-3].isdigit()]
        if folder.is_dir()
        else []
    )
    scores = {int(file.parts[-3]): json.loads(file.read_text(encoding="utf-8")).get(SCORE) for file in files}
    return {step: score for step, score in scores.items() if score is not None}


def best_step(scores: dict[int, float]) -> int | None:
    """The step with the highest score, the newest of equals."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


def checkpoint_steps(run: Path) -> list[int]:
    """The committed steps of a run, ascending; includes those that another process has committed."""
    return committed_steps(checkpoint_folder(run))


def committed_steps(folder: Path) -> list[int]:
    """The steps that a folder of checkpoints or of snapshots has, ascending; [] without the folder."""
    if not folder.is_dir():
        return []
    # Orbax publishes a step by renaming its temporary directory to the bare number.
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def latest_checkpoint(run: Path) -> int | None:
    """The newest committed step of a run, or None."""
    return max(checkpoint_steps(run), default=None)


def best_checkpoint(run: Path) -> int | None:
    """The committed step with the highest score, the newest of equals; None where no step has one."""
    return best_step(checkpoint_scores(run))


def resolve_step(run: Path, step: Step) -> int:
    """The number of a step given as number, None (newest) or `best`; raises UserError if there is none."""
    resolved = (
        step if isinstance(step, int) else latest_checkpoint(run) if step is None else best_checkpoint(run)
    )
    if resolved is None and step is None:
        raise UserError(
            f"{run}: checkpoints: none yet; wait for the first one, or give the model that the run starts "
            "from"
        )
    if resolved is None:
        raise UserError(
            f"{run}: no checkpoint was evaluated while it was trained, so none is the best; leave --step out "
            "or give its number"
        )
    return resolved


def read_checkpoint(run: Path, step: int, params: nnx.State) -> nnx.State:
    """The trainable parameters of one step, shaped like `params`.

    Raises UserError when the step is missing or damaged.
    """
    folder = checkpoint_folder(run) / str(step)
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint_folder(run)}: step {step}: no such checkpoint; the newest is "
            f"{latest_checkpoint(run)}"
        )
    damage = verify_checkpoint(folder, PARAMS)
    if damage:
        others = ", ".join(str(other) for other in checkpoint_steps(run) if other != step)
        raise UserError(
            f"{folder}: is damaged: {damage}; choose another step{f' ({others})' if others else ''}"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return fill_state(
            params, checkpointer.restore(folder / PARAMS, abstract_arrays(nnx.to_pure_dict(params)))
        )


def read_run(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a run directory and its whole `config.json`; raises UserError for another folder."""
    file = path / "config.json"
    try:
        run_json = json.loads(file.read_text(encoding="utf-8"))
        return config_from_dict(RunConfig, run_json["config"]), run_json
    except UserError as error:
        raise UserError(f"{file}: config.{error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not the config of a run ({error}); give the folder that sft or rl wrote to"
        ) from None


def starting_model(run: Path, run_json: dict[str, Any]) -> str:
    """The model that a run starts from; one of the hub at the commit that was recorded.

    Another run is stored relative to this one, so that both can move together.
    """
    start, revision = run_json.get("start"), run_json.get("revision")
    if start is not None:
        return str((run / start).resolve())
    model = run_json["config"]["model"]
    return model if revision is None else f"{model}@{revision}"


def starting_step(run_json: dict[str, Any]) -> int | None:
    """The checkpoint of the run that a run starts from.

    None if it starts from no run, or if an older version wrote no step.
    """
    return run_json.get("start_step")


def abstract_arrays(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays: the target of a restore."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)), tree
    )


def fill_state(params: nnx.State, pure: Any) -> nnx.State:
    """A copy of `params` with the arrays of a pure dictionary."""
    state = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(state, pure)
    return state
