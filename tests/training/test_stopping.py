"""Asked to stop, training saves at the next step boundary and ends with status 0; asked twice, it leaves at
once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.command_folder import Place, computed, equal, until

from search_r3_jax.errors import StoppedError
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.training.stopping import SIGNALS, StopRequest

# A second signal ends the process although its main thread is within a call that returns after a minute.
BUSY = """
import ctypes, time
import sys
from search_r3_jax.console import show_log
from search_r3_jax.training.stopping import StopRequest
show_log(sys.stdout)
with StopRequest():
    print("ready", flush=True)
    # Like a compilation: Python's own handlers do not run before this returns.
    ctypes.CDLL(None).usleep.argtypes = [ctypes.c_uint]
    for _ in range(60):
        ctypes.CDLL(None).usleep(999_999)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_asks_and_leaves_the_handlers_as_they_were(
    tmp_path: Path, number: signal.Signals, log_lines: list[str]
) -> None:
    before, said = signal.getsignal(number), log_lines
    with StopRequest() as request:
        assert not request.asked()
        request.stop_waiting(tmp_path, 3)
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10
        while not request.asked() and time.monotonic() < end:
            time.sleep(0.01)
        assert request.asked()
        with pytest.raises(
            StoppedError,
            match=r"stopped and saved at step 7, \d+\.\d s after the signal; the same command goes on",
        ):
            request.stop_waiting(tmp_path, 7)
    assert said == [f"{number.name}: saving at the end of this step; once more leaves at once"]
    assert signal.getsignal(number) is before


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone() -> None:
    found = list[bool]()

    def work() -> None:
        with StopRequest() as request:
            found.append(request.asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_leaves_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 5
    assert process.stderr is not None
    assert "leaving at once; the same command goes on from the last checkpoint" in process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("sft", signal.SIGTERM),
        ("rl", signal.SIGINT),
        pytest.param("sft", signal.SIGUSR1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    place: Place, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    steps = {f"{stage}__steps": 24, "sft__save_every": 100, "rl__save_every": 100}
    command = place.command(stage, "stopped", **steps)
    process = place.start(command)
    until(lambda: len(place.lines("stopped")) >= 5, process)
    process.send_signal(number)
    assert process.wait(timeout=120) == 0
    found = re.search(
        r"stopped and saved at step (\d+), (\d+\.\d) s after the signal; the same command goes on",
        (tmp_path / "out.txt").read_text(),
    )
    assert found, (tmp_path / "out.txt").read_text()
    step = int(found[1])
    assert len(place.lines("stopped")) == step == checkpoint_steps(tmp_path / "stopped")[-1] < 24
    assert f"going on from step {step}" in place.finish(command)
    replay = ["--replay", str(tmp_path / "stopped")] if stage == "rl" else []
    place.finish(place.command(stage, "whole", *replay, **steps))
    assert [computed(line) for line in place.lines("stopped")] == [
        computed(line) for line in place.lines("whole")
    ]
    equal(place.params("stopped", 24), place.params("whole", 24))


@pytest.mark.slow
def test_one_process_that_is_asked_stops_all_at_the_same_step(place: Place, tmp_path: Path) -> None:
    processes = place.cluster(
        place.command("sft", "stopped", sft__steps=400, sft__save_every=1000), processes=2
    )
    until(lambda: len(place.lines("stopped")) >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    told = [
        re.findall(r"saved at step (\d+)", (tmp_path / f"out-{process}.txt").read_text())
        for process in range(2)
    ]
    assert told[0] == told[1] == [str(len(place.lines("stopped")))]
    assert checkpoint_steps(tmp_path / "stopped") == [len(place.lines("stopped"))]


@pytest.mark.slow
def test_a_run_that_waits_for_its_first_index_stops_too(place: Place, tmp_path: Path) -> None:
    # Nobody makes an index.
    command = place.command("rl", "waiting", "--index.no-local", rl__steps=4)
    process = place.start(command)
    until(lambda: checkpoint_steps(tmp_path / "waiting") == [0], process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, (tmp_path / "out.txt").read_text()
    assert "stopped and saved at step 0" in (tmp_path / "out.txt").read_text()
