"""The schedule of index versions: every step stands in it once, whatever happened while it was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.failing_disk import DISK_FULL

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.indexer.schedule import SCHEDULE, IndexSchedule


def recorded(run: Path, versions: list[int]) -> IndexSchedule:
    run.mkdir(exist_ok=True)
    schedule = IndexSchedule(run)
    for step, version in enumerate(versions):
        schedule.record(step, version)
    return schedule


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    versions = [0, 0, 0, 2, 2, 4]
    schedule = recorded(tmp_path, versions)
    for found in (schedule, IndexSchedule(tmp_path)):
        assert len(found) == 6
        assert [found.version_at(step) for step in range(8)] == [*versions, None, None]
        # A run that goes on from step 3 begins with what step 2 had.
        assert [found.versions_from(step) for step in (0, 3, 4, 6, 9)] == [
            {0, 2, 4},
            {0, 2, 4},
            {2, 4},
            {4},
            set(),
        ]
    with pytest.raises(ValueError, match="the schedule has 6 steps"):
        schedule.record(7, 4)


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    recorded(tmp_path, [0, 0, 3])
    whole = (tmp_path / SCHEDULE).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        (tmp_path / SCHEDULE).write_bytes(whole[:-cut])
        schedule = IndexSchedule(tmp_path)
        assert len(schedule) == 2
        schedule.record(2, 3)
        assert (tmp_path / SCHEDULE).read_bytes() == whole


def test_another_run_takes_a_record_over_and_a_changed_one_forgets_it(tmp_path: Path) -> None:
    recorded(tmp_path / "one", [0, 0, 3])
    (tmp_path / "other").mkdir()
    schedule = IndexSchedule(tmp_path / "other")
    with pytest.raises(UserError, match="no schedule to replay"):
        schedule.copy(tmp_path / "nowhere")
    schedule.copy(tmp_path / "one")
    schedule.record(3, 3)
    assert len(IndexSchedule(tmp_path / "other")) == 4
    assert len(IndexSchedule(tmp_path / "one")) == 3
    schedule.truncate(9)
    schedule.truncate(1)
    assert [IndexSchedule(tmp_path / "other").version_at(step) for step in range(2)] == [0, None]


@pytest.mark.parametrize(
    "text",
    ['{"step": 1, "index": 0}\n', '{"step": 0}\n', "nonsense\n", '{"step": 0, "index": "x"}\n', "[]\n"],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SCHEDULE).write_text(text)
    with pytest.raises(UserError, match="is no index schedule"):
        IndexSchedule(tmp_path)


def test_a_full_disk_is_one_line_and_the_step_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = recorded(tmp_path, [0])

    def full(file: int) -> Any:
        raise DISK_FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"index_schedule.jsonl: cannot be written \(No space left on device\)"
    ):
        schedule.record(1, 0)
    assert len(schedule) == 1
