"""Stage 2 in several processes computes what one computes, stops as one, and goes on after one has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_folder import Place, back_to, computed, equal, until

from search_r3_jax.errors import TRY_AGAIN

pytestmark = pytest.mark.slow
STEPS = 8
PERTURBED = Path(__file__).parents[1] / "helpers" / "perturbed_process.py"
DYING = Path(__file__).parents[1] / "helpers" / "dying_process.py"
# Every part of a step: an old index that is waited for, drift, two epochs, development queries, a refresh.
SETTINGS: dict[str, Any] = {
    "rl__steps": STEPS,
    "rl__global_queries": 4,
    "rl__keep": 9,
    "rl__eval_every": 4,
    "data__dev_queries": 6,
    "lora__dropout": 0.0,
    "index__max_index_age_steps": 3,
    "index__drift_every": 2,
    "index__drift_documents": 12,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora exact": {"index__kind": "exact"},
    "full scann": {"lora__rank": 0, "index__kind": "scann", "index__recall_gate": 0.5},
    "full parts": {"lora__rank": 0, "index__kind": "scann", "index__parts": 3},
    "lora device": {"index__kind": "device"},
    "lora stale": {"index__kind": "exact", "index__scoring": "consistent_stale"},
}


def check_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Every scalar that is no time, within 1e-5.

    Drift is left out: it counts from the last save, which a replay makes at other steps.
    """
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(len(theirs)))
    for mine, other in zip(map(computed, ours), map(computed, theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if name.startswith("drift"):
                continue
            assert value == pytest.approx(other[name], rel=1e-5, abs=1e-5), (mine["step"], name)


def finish_all(
    place: Place, command: list[str], *, processes: int, devices: int = 1, status: int = 0
) -> None:
    for process in place.cluster(command, processes=processes, devices=devices):
        assert process.wait(timeout=600) == status, said(place)


def said(place: Place) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(place.folder.glob("out-*.txt")))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "processes", "devices"),
    [("lora exact", 2, 2), ("full scann", 4, 1), ("full parts", 2, 1), ("lora stale", 2, 1)],
)
def test_several_processes_compute_what_one_computes(
    place: Place, kind: str, processes: int, devices: int
) -> None:
    settings = SETTINGS | KINDS[kind]
    place.finish(place.command("rl", "one", **settings), devices=processes * devices)
    one = place.lines("one")
    assert len({line["index_step"] for line in one}) >= 2
    assert all("dev_reason_ndcg@10" in one[step] for step in (3, 7))
    replay = ("--replay", str(place.folder / "one"))
    finish_all(place, place.command("rl", "all", *replay, **settings), processes=processes, devices=devices)
    check_same(place.lines("all"), one)


@pytest.mark.exhaustive
def test_one_process_repeats_the_run_of_two(place: Place) -> None:
    settings = SETTINGS | KINDS["lora exact"]
    finish_all(place, place.command("rl", "two", **settings), processes=2)
    two = place.lines("two")
    assert [line["step"] for line in two] == list(range(STEPS))
    replay = ("--replay", str(place.folder / "two"))
    place.finish(place.command("rl", "one", *replay, **settings), devices=2)
    check_same(place.lines("one"), two)


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.exhaustive)])
def test_any_process_may_be_killed_and_one_of_them_be_odd(
    place: Place, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """Process 1 is an odd machine throughout. Two even ones repeat the run to the last bit, and one alone
    within rounding. Both hold a share of the index."""
    if kills == 1:
        # Where minutes count.
        monkeypatch.setenv("LATE_SECONDS", "2")
    generator, steps = np.random.default_rng(3), 2 + 6 * kills
    settings = SETTINGS | KINDS["lora device"] | {"rl__steps": steps, "rl__save_every": 2}
    command = place.command("rl", "killed", **settings)
    odd = [command[0], str(PERTURBED), *command[3:]]
    told = dict[int, dict[str, Any]]()
    for number in range(kills):
        processes = place.cluster(command, processes=2, commands=[command, odd])
        wait_for_steps(place, "killed", processes, int(generator.integers(1, 4)))
        time.sleep(generator.uniform(0, 0.4))
        victim = number % 2
        processes[victim].kill()
        killed = time.monotonic()
        assert processes[1 - victim].wait(timeout=120) == TRY_AGAIN, said(place)
        assert time.monotonic() - killed < 20
        for line in place.lines("killed"):
            assert told.setdefault(line["step"], computed(line)) == computed(line)
    for process in place.cluster(command, processes=2, commands=[command, odd]):
        assert process.wait(timeout=600) == 0, said(place)
    lines = place.lines("killed")
    assert [line["step"] for line in lines] == list(range(steps))
    assert len({line["index_step"] for line in lines}) >= 2
    assert all("dev_reason_ndcg@10" in line for line in lines[3::4])

    replay = ("--replay", str(place.folder / "killed"))
    finish_all(place, place.command("rl", "even", *replay, **settings), processes=2)
    assert [computed(line) for line in place.lines("even")] == [computed(line) for line in lines]
    equal(place.params("even", steps), place.params("killed", steps))
    place.finish(place.command("rl", "one", *replay, **settings), devices=2)
    # Later, what rounding differs by has grown with every update.
    check_same(place.lines("one")[:STEPS], lines[:STEPS])


def wait_for_steps(place: Place, run: str, processes: list[subprocess.Popen[bytes]], steps: int) -> None:
    before = len(place.lines(run))
    until(lambda: len(place.lines(run)) >= before + steps, processes[0])
    assert all(process.poll() is None for process in processes), said(place)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("call", ["encode documents", "stop asked", "save"])
def test_a_process_that_dies_in_a_call_of_the_leader_ends_all(place: Place, call: str, victim: int) -> None:
    settings = SETTINGS | KINDS["lora exact"] | {"index__max_index_age_steps": 1, "rl__save_every": 3}
    command = place.command("rl", "run", **settings)
    commands = [command, command]
    commands[victim] = [command[0], str(DYING), call, *command[3:]]
    processes = place.cluster(command, processes=2, commands=commands)
    assert processes[victim].wait(timeout=300) == -signal.SIGKILL, said(place)
    died = time.monotonic()
    assert processes[1 - victim].wait(timeout=120) == TRY_AGAIN, said(place)
    assert time.monotonic() - died < 20


@pytest.mark.exhaustive
def test_a_run_goes_on_in_another_number_of_processes(place: Place, tmp_path: Path) -> None:
    settings = SETTINGS | KINDS["lora exact"] | {"rl__save_every": 2}
    command = place.command("rl", "run", **settings)
    place.finish(command, devices=4)
    one = place.lines("run")
    for step, processes, devices in ((2, 2, 2), (4, 4, 1), (6, 1, 4)):
        back_to(tmp_path / "run", step)
        if processes == 1:
            place.finish(command, devices=devices)
        else:
            finish_all(place, command, processes=processes, devices=devices)
        check_same(place.lines("run"), one)


def stop_one(place: Place, run: str, processes: list[subprocess.Popen[bytes]], rank: int) -> None:
    """A signal to one ends all, soon and alike, and the steps that were told of are saved."""
    assert all(process.poll() is None for process in processes), said(place)
    os.kill(processes[rank].pid, signal.SIGTERM)
    asked = time.monotonic()
    assert [process.wait(timeout=60) for process in processes] == [0, 0], said(place)
    assert time.monotonic() - asked < 20
    assert f"stopped and saved at step {len(place.lines(run))}" in said(place)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_signal_to_one_ends_all_while_they_wait(place: Place, rank: int) -> None:
    """Nobody builds an index: all wait for the first one."""
    command = place.command("rl", "waiting", "--index.no-local", **SETTINGS | KINDS["lora exact"])
    processes = place.cluster(command, processes=2)
    until(lambda: (place.folder / "waiting" / "checkpoints" / "0").is_dir(), processes[0])
    time.sleep(3)
    stop_one(place, "waiting", processes, rank)
    assert place.lines("waiting") == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_ends_all_while_they_wait_for_a_newer_index(place: Place, rank: int) -> None:
    settings = SETTINGS | KINDS["lora exact"] | {"rl__steps": 40}
    command = place.command("rl", "waiting", "--index.no-local", **settings)
    processes = place.cluster(command, processes=2)
    until(lambda: (place.folder / "waiting" / "checkpoints" / "0").is_dir(), processes[0])
    run = str(place.folder / "waiting")
    indexer = place.start([sys.executable, "-m", "search_r3_jax", "indexer", "--run", run], log="indexer.txt")
    until(lambda: len(place.lines("waiting")) >= 1, processes[0])
    indexer.kill()
    # Three steps behind the last index that it built, however many those were.
    until(lambda: "waiting for a newer one" in said(place), processes[0])
    time.sleep(1)
    stop_one(place, "waiting", processes, rank)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_ends_all_between_two_steps(place: Place, rank: int) -> None:
    settings = SETTINGS | KINDS["lora exact"] | {"rl__steps": 400, "index__max_index_age_steps": 0}
    processes = place.cluster(place.command("rl", "running", **settings), processes=2)
    wait_for_steps(place, "running", processes, 2)
    stop_one(place, "running", processes, rank)


def test_a_mistake_of_one_ends_all_with_its_status(place: Place, tmp_path: Path) -> None:
    """Another trainer has the run open, which only process 0 finds out."""
    settings = SETTINGS | KINDS["lora exact"]
    other = place.start(place.command("rl", "open", "--index.no-local", **settings), devices=1)
    until(lambda: (tmp_path / "open" / "checkpoints" / "0").is_dir(), other)
    command = place.command("rl", "open", "--index.no-local", **settings)
    processes = place.cluster(command, processes=2)
    assert [process.wait(timeout=120) for process in processes] == [2, 2], said(place)
    assert "another trainer has this run open" in (tmp_path / "out-0.txt").read_text()
    assert "process 0 met a mistake; process 1 stops too" in (tmp_path / "out-1.txt").read_text()
