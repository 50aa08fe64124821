"""Snapshots of stage 2: a missing one is written by the run that goes on, and an old run stays the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import Place, back_to, computed, equal

from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.hub.snapshot_reader import as_snapshot, pin_snapshots, read_snapshot, snapshot_steps

pytestmark = pytest.mark.slow
KILLED = Path(__file__).parents[1] / "helpers" / "killed_before_snapshot.py"
SETTINGS: dict[str, Any] = {
    "rl__steps": 8,
    "rl__save_every": 2,
    "rl__keep": 9,
    "index__kind": "exact",
    "index__max_index_age_steps": 2,
}
FULL = {"lora__rank": 0, "compute_dtype": "bfloat16"}


def snapshot_of(place: Place, run: str, step: int) -> Any:
    """A snapshot's parameters in bfloat16."""
    params = nnx.state(load_model(place.model).decoder, nnx.Param)
    found = read_snapshot(place.folder / run, step, as_snapshot(params, jnp.dtype("bfloat16")))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(found))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_killed_between_checkpoint_and_snapshot_the_same_command_writes_it(
    place: Place, tmp_path: Path, processes: int
) -> None:
    command, run = place.command("rl", "run", **SETTINGS | FULL), tmp_path / "run"
    dying = [command[0], str(KILLED), *command[3:]]
    started = (
        [place.start(dying)] if processes == 1 else place.cluster(command, processes=2, commands=[dying] * 2)
    )
    assert started[0].wait(timeout=300) == -9
    for process in started[1:]:
        process.wait(timeout=120)
    # Others are saved where an index is waited for.
    assert checkpoint_steps(run)[-1] == 4
    assert 4 not in snapshot_steps(run)
    # To be looked at in the end.
    pin_snapshots(run, "test", [4])
    if processes == 1:
        assert "going on from step 4" in place.finish(command)
    else:
        for process in place.cluster(command, processes=2):
            assert process.wait(timeout=300) == 0
    assert snapshot_steps(run) == [4, 8]
    for step in (4, 8):
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), place.params("run", step, rank=0))
        equal(snapshot_of(place, "run", step), rounded)
    lines = place.lines("run")
    assert len({line["index_step"] for line in lines}) >= 3
    if processes == 1:
        place.finish(place.command("rl", "whole", "--replay", str(run), **SETTINGS | FULL))
        assert [computed(line) for line in place.lines("whole")] == [computed(line) for line in lines]
        equal(place.params("whole", 8, rank=0), place.params("run", 8, rank=0))


@pytest.mark.parametrize("scoring", [pytest.param("fresh", marks=pytest.mark.exhaustive), "consistent_stale"])
def test_a_run_from_before_there_were_snapshots_goes_on_bit_equal(
    place: Place, tmp_path: Path, scoring: str
) -> None:
    settings = SETTINGS | {"rl__save_every": 4, "index__scoring": scoring}
    command, run = place.command("rl", "run", **settings), tmp_path / "run"
    place.finish(command)
    lines, params = [computed(line) for line in place.lines("run")], place.params("run", 8)
    # Where the index in use is of an earlier step; a later one, of a step that was saved because training
    # waited, is published but its parameters are gone.
    assert lines[4]["index_step"] == 3
    assert lines[7]["index_step"] in (5, 6, 7)
    back_to(run, 4)
    shutil.rmtree(run / "snapshots")
    said = place.finish(command)
    assert "snapshot" not in said
    assert [computed(line) for line in place.lines("run")] == lines
    equal(place.params("run", 8), params)
    assert 8 in snapshot_steps(run)
