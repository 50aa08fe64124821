"""What training does about its index between steps, with a follower that is told what to hand over."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from search_r3_jax.config import IndexConfig, LoraConfig, RunConfig, SamplerConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.hub.snapshot_reader import pinned_snapshots
from search_r3_jax.retrieval.environment.environment import Environment
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.live_index import LiveIndex
from search_r3_jax.training.rl_acts import reencode_rollout

ROWS = 30


def vectors(step: int) -> np.ndarray:
    start, moved = (np.random.default_rng(seed).normal(size=(ROWS, 8)) for seed in (0, 1))
    found = start + 0.1 * step * moved
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def index(step: int) -> ExactIndex:
    return ExactIndex(vectors(step), [str(row) for row in range(ROWS)], step)


class ScriptedFollower:
    """Hands over an index when the test has put it there; waiting finds the checkpoint that was saved
    last."""

    def __init__(self) -> None:
        self.ready: Index | None = None
        self.saved = 0
        self.waited = 0

    def newer_than(self, version: int | None, *, at_most: int) -> Index | None:
        if self.ready is None or not (version or 0) < self.ready.version <= at_most:
            return None
        return self.ready

    def wait_for_newer(self, version: int | None, *, at_most: int, on_wait: Any = None) -> Index:
        assert self.saved <= at_most
        self.waited += 1
        time.sleep(0.05)
        return index(self.saved)

    def version_stats(self, version: int) -> dict[str, float]:
        return {"step": version}

    def is_published(self, version: int, *, local_only: bool = False) -> bool:
        return True

    def versions_to_keep(self) -> set[int]:
        return set()

    def wait_for(self, version: int, *, on_wait: Any = None) -> None:
        raise AssertionError(f"version {version} is published")

    def open_version(self, version: int) -> Index:
        raise AssertionError(f"version {version} is not asked for")

    def start(self) -> None:
        """Nothing runs beside the test."""

    def check(self) -> None:
        """Nothing runs beside the test."""

    def close(self) -> None:
        """Nothing runs beside the test."""


class IndexedSteps:
    """A live index over vectors that drift with every step."""

    def __init__(self, folder: Path, **settings: Any):
        self.follower, self.now = ScriptedFollower(), 0
        self.environment = Environment(index(0), lambda rows: vectors(self.now)[rows])
        folder.mkdir(exist_ok=True)
        self.schedule = IndexSchedule(folder)
        config = RunConfig(index=IndexConfig(**settings))
        self.index = LiveIndex(folder, config, self.follower, self.environment, self.schedule)

    def step(self, step: int) -> dict[str, float]:
        def save() -> None:
            self.follower.saved = step

        # The steps that the test leaves out.
        for passed in range(len(self.schedule), step):
            self.schedule.record(passed, self.environment.index.version)
        return self.index.before_step(step, save)


def test_a_newer_index_is_taken_in_and_recorded(tmp_path: Path, log_lines: list[str]) -> None:
    subject = IndexedSteps(tmp_path)
    subject.step(1)
    assert subject.index.statistics.swaps == ()
    subject.follower.ready = index(2)
    subject.step(3)
    subject.step(4)
    assert subject.index.statistics.swaps == ((3, 2),)
    assert list(subject.index.statistics.versions) == [{"step": 0}, {"step": 2}]
    assert subject.environment.index.version == 2
    assert log_lines == ["step 3: the index built from step 2 is in use"]


def test_an_old_index_is_waited_for(tmp_path: Path, log_lines: list[str]) -> None:
    subject = IndexedSteps(tmp_path, max_index_age_steps=5, on_stale_index="wait")
    assert subject.step(5)["index_wait_seconds"] < 0.01
    stalls = subject.step(6)
    assert (subject.follower.saved, subject.follower.waited, subject.environment.index.version) == (6, 1, 6)
    assert stalls["index_wait_seconds"] >= 0.05
    assert 0 < stalls["index_stall_share"] <= 1
    assert "the index is 6 steps old, more than index.max_index_age_steps 5; waiting" in log_lines[0]
    assert subject.step(11)["index_wait_seconds"] < 0.01


def test_an_old_index_is_warned_of_once(tmp_path: Path, log_lines: list[str]) -> None:
    subject = IndexedSteps(tmp_path, max_index_age_steps=5, on_stale_index="warn")
    for step in (5, 6, 7):
        subject.step(step)
    assert len(log_lines) == 1
    assert "warning: step 6" in log_lines[0]
    subject.follower.ready = index(7)
    subject.step(12)
    subject.step(13)
    assert [line for line in log_lines if "warning" in line][1:] == [log_lines[-1]]


def test_an_old_index_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    subject = IndexedSteps(tmp_path, max_index_age_steps=5, on_stale_index="stop")
    subject.step(5)
    with pytest.raises(UserError, match="a checkpoint was saved"):
        subject.step(6)
    assert subject.follower.saved == 6


def test_drift_asks_for_a_checkpoint(tmp_path: Path) -> None:
    subject = IndexedSteps(tmp_path, drift_every=2, drift_cosine=0.99, drift_overlap=0.0)
    subject.index.checkpoint_saved()
    subject.now = 1
    assert subject.index.drifted(1) == (False, {})
    due, scalars = subject.index.drifted(2)
    assert not due
    assert scalars["drift_cosine"] == pytest.approx(
        np.einsum("ne,ne->n", vectors(0), vectors(1)).mean(), abs=1e-6
    )
    subject.now = 4
    due, scalars = subject.index.drifted(4)
    assert due
    assert scalars["drift_cosine"] < 0.99
    # From the checkpoint on it counts anew.
    subject.index.checkpoint_saved()
    assert not subject.index.drifted(6)[0]


def test_the_snapshot_of_the_index_is_kept_for_the_scoring_that_reads_it(tmp_path: Path) -> None:
    IndexedSteps(tmp_path / "other", scoring="fresh")
    assert pinned_snapshots(tmp_path / "other") == []
    subject = IndexedSteps(tmp_path / "run", scoring="consistent_stale")
    assert pinned_snapshots(tmp_path / "run") == [0]
    subject.follower.ready = index(2)
    subject.step(3)
    assert pinned_snapshots(tmp_path / "run") == [2]


@pytest.mark.slow
def test_replies_are_embedded_by_whose_parameters_they_are_given(tiny_folders: dict[str, Path]) -> None:
    model = with_lora(load_model(tiny_folders["llama"]), LoraConfig(rank=4), seed=0)
    prompter, texts = Prompter(model.tokenizer), ["one", "another query", "a third"]
    graph, state = nnx.split(model.decoder)
    generator = np.random.default_rng(0)
    other = jax.tree.map(lambda x: x + 0.05 * generator.standard_normal(x.shape).astype(x.dtype), state)
    rollout = Sampler(graph, prompter, SamplerConfig(max_think_tokens=8, temperature=1.0)).sample(
        state, texts, rollout_seeds(0, 0, range(3), 4), max_tokens=16
    )
    # A random model writes hardly any embed token; the forced ones do as well here.
    rollout = dataclasses.replace(rollout, valid=np.arange(12) != 5)
    encoder = ReasonedEncoder(graph, prompter)
    same = reencode_rollout(encoder, state, texts, rollout, 16)
    np.testing.assert_allclose(same[rollout.valid], rollout.vectors[rollout.valid], atol=1e-5)
    np.testing.assert_array_equal(same[5], 0)
    assert np.abs(reencode_rollout(encoder, other, texts, rollout, 16) - same).max() > 0.01
