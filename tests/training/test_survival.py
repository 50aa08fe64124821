"""Killed at random moments and started again by the same command, a run ends where an uninterrupted one ends,
to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.command_folder import Place, computed, equal, until

from search_r3_jax.errors import TRY_AGAIN
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.retrieval.indexer.heartbeat import read_beat
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule

# These runs take many steps: what compiles in seconds more is soon won back.
pytestmark = pytest.mark.usefixtures("optimised")

# Between two kills a run advances by less than so many steps, also where a step takes 50 ms.
STEPS_A_KILL = 14
# A start that finds its programs compiled takes about so long; a kill may come anywhere in it.
START_SECONDS = 8.0
# A process whose peer was killed ends within so many seconds, on a machine that is busy with other things.
BOUND_SECONDS = 20.0


def wait_for_a_moment(
    place: Place,
    run: str,
    process: subprocess.Popen[bytes],
    generator: np.random.Generator,
    *,
    starting: float = 0.25,
) -> None:
    """A random time within the start of a process, with probability `starting`, or a random number of steps
    and a random time after it."""
    if generator.random() < starting:
        time.sleep(generator.uniform(0, START_SECONDS))
        return
    seen, steps = len(place.lines(run)), int(generator.integers(1, 6))

    def advanced() -> bool:
        nonlocal seen
        told = len(place.lines(run))
        # Steps since the last save are taken, and told of, again.
        seen = min(seen, told)
        return told >= seen + steps

    until(advanced, process)
    # Through the step, the save behind it, and the next.
    time.sleep(generator.uniform(0, 0.4))


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(13, marks=pytest.mark.exhaustive)])
def test_stage_1_killed_at_random_moments_ends_bit_equal(place: Place, tmp_path: Path, kills: int) -> None:
    generator, steps = np.random.default_rng(0), STEPS_A_KILL * kills
    place.finish(place.command("sft", "whole", sft__steps=steps))
    whole = [computed(line) for line in place.lines("whole")]
    assert [line["step"] for line in whole] == list(range(steps))
    command = place.command("sft", "killed", sft__steps=steps)
    for number in range(kills):
        process = place.start(command)
        wait_for_a_moment(place, "killed", process, generator)
        if number == kills - 1:
            # However early it was killed, something is saved in the end that it can go on from.
            until(lambda: bool(checkpoint_steps(tmp_path / "killed")), process)
        assert process.poll() is None, (tmp_path / "out.txt").read_text()[-3000:]
        process.kill()
        process.wait()
        # Every step that it ever told of, also those that will be taken again.
        found = place.lines("killed")
        assert [computed(line) for line in found] == whole[: len(found)]
    said = place.finish(command)
    assert "going on from step" in said
    assert [computed(line) for line in place.lines("killed")] == whole
    equal(place.params("killed", steps), place.params("whole", steps))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.exhaustive)])
def test_stage_2_killed_at_random_moments_is_repeated_bit_equal(
    place: Place, tmp_path: Path, kills: int
) -> None:
    """Trainer, indexer or both are killed; an uninterrupted run that replays the index schedule is
    the same run."""
    generator, steps = np.random.default_rng(1), STEPS_A_KILL * kills
    run = tmp_path / "killed"
    command, told, indexers = (
        place.command("rl", "killed", rl__steps=steps),
        dict[int, dict[str, object]](),
        0,
    )
    for _ in range(kills):
        process = place.start(command)
        wait_for_a_moment(place, "killed", process, generator)
        victim, beat = generator.choice(["trainer", "indexer", "both"], p=[0.5, 0.3, 0.2]), read_beat(run)
        if victim != "trainer" and beat is not None:
            kill(beat.pid)
            indexers += 1
        if victim == "indexer":
            # Training goes on without it, for a while.
            wait_for_a_moment(place, "killed", process, generator)
        assert process.poll() is None, (tmp_path / "out.txt").read_text()[-3000:]
        process.kill()
        process.wait()
        for line in place.lines("killed"):
            # A step that is taken again is the same step.
            assert told.setdefault(line["step"], computed(line)) == computed(line)
    assert indexers >= kills // 2
    place.finish(command)
    lines = [computed(line) for line in place.lines("killed")]
    assert [line["step"] for line in lines] == list(range(steps))
    schedule = IndexSchedule(run)
    assert [schedule.version_at(step) for step in range(steps)] == [line["index_step"] for line in lines]
    assert len(schedule.versions_from(0)) > 3

    place.finish(place.command("rl", "whole", "--replay", str(run), rl__steps=steps))
    assert [computed(line) for line in place.lines("whole")] == lines
    equal(place.params("whole", steps), place.params("killed", steps))


# Of two processes of stage 2 one is killed in `test_rl_processes`.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_one_of_them_killed_end_bit_equal(place: Place, tmp_path: Path) -> None:
    generator, kills = np.random.default_rng(2), 5
    steps = STEPS_A_KILL * kills
    for process in place.cluster(place.command("sft", "whole", sft__steps=steps), processes=2):
        assert process.wait(timeout=600) == 0, (tmp_path / "out-0.txt").read_text()[-3000:]
    whole = [computed(line) for line in place.lines("whole")]
    assert [line["step"] for line in whole] == list(range(steps))
    command = place.command("sft", "killed", sft__steps=steps)
    for number in range(kills):
        processes = place.cluster(command, processes=2)
        # Before they have found each other, JAX lets the one that is left wait for minutes.
        wait_for_a_moment(place, "killed", processes[0], generator, starting=0.0)
        victim = number % 2
        assert processes[victim].poll() is None
        processes[victim].kill()
        killed = time.monotonic()
        assert processes[1 - victim].wait(timeout=300) == TRY_AGAIN
        assert time.monotonic() - killed < BOUND_SECONDS
        assert (
            f"process {victim} is gone; process {1 - victim} stops too"
            in (tmp_path / f"out-{1 - victim}.txt").read_text()
        )
        found = place.lines("killed")
        assert [computed(line) for line in found] == whole[: len(found)]
    for process in place.cluster(command, processes=2):
        assert process.wait(timeout=600) == 0, (tmp_path / "out-0.txt").read_text()[-3000:]
    assert [computed(line) for line in place.lines("killed")] == whole
    equal(place.params("killed", steps), place.params("whole", steps))
