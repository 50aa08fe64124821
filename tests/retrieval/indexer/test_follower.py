"""The trainer's side of the index: scheduled versions open, later ones wait, those needed again are kept."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.index_versions import FIELDS, unit

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import checkpoint_folder
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer import follower as follower_module
from search_r3_jax.retrieval.indexer.follower import POLL_SECONDS, IndexFollower
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.retrieval.store.versions import (
    PublishOptions,
    list_versions,
    open_version,
    pinned_versions,
    prune_versions,
    publish_version,
)
from search_r3_jax.training.live_index import versions_to_keep


def publish(run: Path, *steps: int) -> None:
    for step in steps:
        ids = [f"d{i}" for i in range(30)]
        publish_version(
            index_folder(run),
            step=step,
            vectors=unit(30, seed=step),
            ids=ids,
            manifest_fields=FIELDS,
            options=PublishOptions(kind="exact"),
        )


def follower_of(run: Path, **settings: Any) -> IndexFollower:
    run.mkdir(exist_ok=True)
    return IndexFollower(run, "c", 9, settings=IndexConfig(local=False), **settings)


def holds(index: Any, step: int) -> None:
    assert index.version == step
    np.testing.assert_array_equal(index.take(np.arange(30)), unit(30, seed=step))


def test_a_recorded_version_is_opened_from_the_replayed_run_or_the_own(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    publish(own, 0, 4)
    publish(other, 0, 2)
    follower = follower_of(own, replayed=[index_folder(other)])
    for step in (0, 2, 4):
        assert follower.is_published(step)
        holds(follower.open_version(step), step)
        assert step in pinned_versions(index_folder(own))
        assert follower.version_stats(step)["step"] == step
    assert follower.is_published(4, local_only=True)
    assert not follower.is_published(2, local_only=True)
    assert not follower.is_published(6)
    with pytest.raises(
        UserError,
        match=r"v6: the run's schedule names this version, but it is not there; put it back, or "
        r".*--allow-config-change",
    ):
        follower.open_version(6)
    # Damaged there, it is not taken; the error says what is wrong with it.
    (index_folder(other) / "v2" / "vectors").write_bytes(b"")
    with pytest.raises(UserError, match=r"v2: the run's schedule names this version, but .*v2"):
        follower.open_version(2)


def test_a_version_from_a_later_step_is_left_until_that_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    publish(run, 3, 8)
    follower = follower_of(run)
    follower.start()
    try:
        wait_until(lambda: bool(follower.open_versions()))
        for step in range(8):
            assert follower.newer_than(3, at_most=step) is None
        found = follower.newer_than(3, at_most=8)
        holds(found, 8)
    finally:
        follower.close()


@pytest.mark.parametrize("slower", ["training", "thread"])
def test_a_version_that_training_and_the_thread_open_at_once_hides_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: str
) -> None:
    run = tmp_path / "run"
    publish(run, 0)
    follower = follower_of(run)
    both_opening, training_has_it = threading.Barrier(2, timeout=30), threading.Event()

    def open_at_once(*given: Any, **expected: Any) -> Index:
        index = open_version(*given, **expected)
        if index.version == 0:
            both_opening.wait()
            if threading.current_thread() is not threading.main_thread():
                assert slower == "training" or training_has_it.wait(30)
            elif slower == "training":
                wait_until(lambda: 0 in follower.open_versions())
        return index

    monkeypatch.setattr("search_r3_jax.retrieval.indexer.follower.open_version", open_at_once)
    follower.start()
    try:
        holds(follower.open_version(0), 0)
        training_has_it.set()
        end = time.monotonic() + 2 * POLL_SECONDS
        while time.monotonic() < end:
            assert follower.newer_than(0, at_most=1) is None
            time.sleep(0.05)
        publish(run, 2)
        wait_until(lambda: 2 in follower.open_versions())
        holds(follower.newer_than(0, at_most=2), 2)
    finally:
        follower.close()


def test_a_share_that_is_away_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    run, asked = tmp_path / "run", list[int]()
    publish(run, 0)
    current = follower_module.current_version

    def flaky(root: Any) -> int | None:
        asked.append(0)
        if len(asked) <= 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return current(root)

    monkeypatch.setattr(follower_module, "current_version", flaky)
    follower = follower_of(run)
    follower.start()
    try:
        wait_until(lambda: 0 in follower.open_versions())
        follower.check()
    finally:
        follower.close()
    assert len(asked) > 3
    assert len([line for line in log_lines if "cannot be looked up" in line]) == 1


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_kept_checkpoint_may_need_is_not_pruned(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    schedule = IndexSchedule(run)
    # v0 up to step 3, v2 up to step 5, v4 up to step 8, then v8.
    for step, version in enumerate([0, 0, 0, 0, 2, 2, 4, 4, 4, 8, 8]):
        schedule.record(step, version)
    for step in (0, 3, 6, 9, 11):
        (checkpoint_folder(run) / str(step)).mkdir(parents=True)
    assert versions_to_keep(run, schedule, 1) == {0, 2, 4, 8}
    for step in (3, 6):
        (checkpoint_folder(run) / str(step)).rmdir()
    # The start needs the first again, step 9 goes on with the fourth.
    assert versions_to_keep(run, schedule, 2) == {0, 4, 8}
    (checkpoint_folder(run) / "0").rmdir()
    assert versions_to_keep(run, schedule, 2) == {4, 8}
    assert versions_to_keep(run, schedule, 1) == {4, 8}
    (checkpoint_folder(run) / "9").rmdir()
    assert versions_to_keep(run, schedule, 1) == {8}

    publish(run, 0, 2, 4, 8, 10, 12)
    (checkpoint_folder(run) / "9").mkdir()
    follower = follower_of(run, versions_to_keep=lambda: versions_to_keep(run, schedule, 2))
    follower.open_version(10)
    assert prune_versions(index_folder(run), keep=1) == [0, 2]
    assert list_versions(index_folder(run)) == [4, 8, 10, 12]
