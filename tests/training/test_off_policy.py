"""Replies that are written one step ahead: of which parameters they are, and the same after a resume."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import back_to, computed, equal
from helpers.rl_runs import lines_of, run_it, start_of_run

from search_r3_jax.config import IndexConfig, RunConfig
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.hub.checkpoint_reader import read_checkpoint
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.rollout.sampler import RunningRollout, Sampler

pytestmark = pytest.mark.slow
STEPS = 6
AHEAD = {"off_policy_steps": 1, "importance_cap": 2.0, "save_every": 1, "keep": 9}


def start_ahead(folder: Path, model: Path, **rl: Any) -> tuple[RunConfig, TrainingSet, LoadedModel]:
    config, data, loaded = start_of_run(folder, model, **(AHEAD | rl))
    # Versions come when they come; this one stays.
    index = dataclasses.replace(config.index, keep_versions=20)
    return dataclasses.replace(config, index=index), data, loaded


def plain(params: nnx.State) -> Any:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(params))


def test_replies_are_of_the_parameters_that_the_step_before_began_with(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, start = list[Any](), Sampler.start

    def started(
        sampler: Sampler, state: nnx.State, texts: Sequence[str], *arguments: Any, **named: Any
    ) -> RunningRollout:
        used.append(jax.tree.map(np.array, nnx.to_pure_dict(state)))
        return start(sampler, state, texts, *arguments, **named)

    monkeypatch.setattr(Sampler, "start", started)
    config, data, model = start_ahead(tmp_path, tiny_folders["llama"])
    run = tmp_path / "run"
    run_it(config, run, data, model)
    assert len(used) == STEPS
    like = nnx.state(model.decoder, trainable_filter(model.decoder))
    saved = [plain(read_checkpoint(run, step, like)) for step in range(STEPS)]
    before, after = (jax.tree.leaves(each) for each in saved[1:3])
    assert not all(np.array_equal(*each) for each in zip(before, after, strict=True))
    for step, state in enumerate(used):
        begun_with = saved[max(step - 1, 0)]
        equal(_same_places(begun_with, state), begun_with)


def _same_places(params: Any, state: Any) -> Any:
    """The arrays of `state` at the places of `params`."""
    if not isinstance(params, dict):
        return state
    return {name: _same_places(below, state[name]) for name, below in params.items()}


@pytest.mark.parametrize(
    "step", [3, *(pytest.param(step, marks=pytest.mark.exhaustive) for step in (1, STEPS - 1))]
)
def test_a_resumed_run_is_the_same(tiny_folders: dict[str, Path], tmp_path: Path, step: int) -> None:
    config, data, model = start_ahead(tmp_path, tiny_folders["llama"])
    run = tmp_path / "run"
    whole = run_it(config, run, data, model)
    lines = [computed(line) for line in lines_of(run / "metrics.jsonl")]
    back_to(run, step)
    resumed = run_it(config, run, data, model)
    assert [computed(line) for line in lines_of(run / "metrics.jsonl")] == lines
    equal(plain(resumed.params), plain(whole.params))


def test_where_nothing_is_learnt_it_is_the_run_on_policy(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for name, changes in (("ahead", {}), ("on", {"off_policy_steps": 0})):
        config, data, model = start_ahead(tmp_path / name, tiny_folders["llama"], **changes)
        rate = dataclasses.replace(config.rl.optimizer, learning_rate=0.0)
        index = IndexConfig(candidates=12, scoring="stale", max_index_age_steps=0)
        config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, optimizer=rate), index=index)
        run_it(config, tmp_path / name / "run", data, model)
        found.append([computed(line) for line in lines_of(tmp_path / name / "run" / "metrics.jsonl")])
    # Which of the equal index versions was in use depends on the clock.
    for line in (*found[0], *found[1]):
        for name in [name for name in line if name.startswith("index_")]:
            del line[name]
    assert found[0] == found[1]
