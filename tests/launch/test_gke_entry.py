"""The entry point of the container: it ends as the run did, waits before it is started again, and gives an
indexer its own chips."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns
from helpers.fake_cloud_tools import ODD_ARGUMENTS as ODD

SAVED = (
    "search-r3: r: stopped and saved at step 7, 1.0 s after the signal; the same command goes on from there"
)


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    standins = StandIns(tmp_path)
    standins.add("kubectl", reads=True)
    return standins


@pytest.mark.parametrize(
    ("program", "signal", "status"),
    [
        ("echo hello; exit 0", False, 0),
        ("echo hello; exit 75", False, 75),
        ("echo hello; kill -9 $$", False, 137),
        (
            f"trap 'sleep 0.2; echo \"{SAVED}\"; exit 0' TERM; echo hello; for ((left = 500; left; left--)); "
            "do sleep 0.02; done",
            True,
            75,
        ),
        ("trap 'exit 0' TERM; echo hello; for ((left = 500; left; left--)); do sleep 0.02; done", True, 0),
    ],
)
def test_the_container_ends_as_the_run_did(
    cluster: StandIns, tmp_path: Path, program: str, signal: bool, status: int
) -> None:
    cluster.program("search-r3", f"printf '%s\\0' \"$@\" >{tmp_path}/arguments\n{program}")
    command = ["bash", str(LAUNCH / "gke/entry.sh"), *ODD]
    # Asked to stop, it waits for nothing.
    environment = cluster.environment({"SEARCH_R3_PAUSE": "300" if signal else "0"})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n"
    if signal:
        process.terminate()
    assert process.wait(timeout=30) == status
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == ODD
    assert (process.stdout.read() == SAVED + "\n") == (signal and status == 75)
    # What it wrote is not kept beside what was shown.
    assert list(tmp_path.glob("tmp.*")) == []


@pytest.mark.parametrize(
    ("attempt", "first", "pause"),
    [("", "10", "10"), ("0", "10", "10"), ("3", "10", "80"), ("40", "10", "300"), ("3", "0", None)],
)
def test_a_container_waits_before_it_ends_with_75(
    cluster: StandIns, tmp_path: Path, attempt: str, first: str, pause: str | None
) -> None:
    cluster.program("sleep", f'echo "$1" >>{tmp_path}/sleeps')
    cluster.program("search-r3", "exit 75")
    done = cluster.run("gke/entry.sh", "sft", SEARCH_R3_ATTEMPT=attempt, SEARCH_R3_PAUSE=first)
    assert done.returncode == 75
    sleeps = (tmp_path / "sleeps").read_text().split() if (tmp_path / "sleeps").exists() else []
    assert sleeps == ([] if pause is None else [pause])
    assert ("passes by itself; it starts again in" in done.stdout) == (pause is not None)


def test_a_container_ends_at_once_with_2_or_when_it_is_stopped(cluster: StandIns, tmp_path: Path) -> None:
    cluster.program("search-r3", "echo wrong >&2; exit 2")
    done = cluster.run("gke/entry.sh", "sft", SEARCH_R3_PAUSE="300")
    assert done.returncode == 2
    assert done.stdout.splitlines()[0] == "wrong"
    assert "status 2: what it says above is to be mended, and is not tried again" in done.stdout
    # A signal ends the pause, too.
    cluster.program("search-r3", "exit 75")
    command = ["bash", str(LAUNCH / "gke/entry.sh"), "sft"]
    environment = cluster.environment({"SEARCH_R3_PAUSE": "300"})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "starts again in 300 s" in process.stdout.readline()
    # Until the pause has begun: a signal is lost that reaches a process just as it starts.
    time.sleep(1)
    process.terminate()
    assert process.wait(timeout=30) == 75


@pytest.mark.slow
def test_an_indexer_waits_for_its_run_with_its_own_chips(cluster: StandIns, tmp_path: Path) -> None:
    cluster.program(
        "search-r3", 'echo "$TPU_PROCESS_BOUNDS $TPU_CHIPS_PER_PROCESS_BOUNDS $TPU_VISIBLE_CHIPS" "$@"'
    )
    run = tmp_path / "rl"
    command = ["bash", str(LAUNCH / "gke/entry.sh"), "indexer", "--run", str(run), "--process", "1"]
    environment = cluster.environment({"SEARCH_R3_BOUNDS": "2,2,1", "TPU_WORKER_HOSTNAMES": "a,b"})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("waiting for ")
    run.mkdir()
    (run / "config.json").touch()
    assert process.stdout.readline() == f"1,1,1 2,2,1 0,1,2,3 indexer --run {run} --process 1\n"
    assert process.wait(timeout=30) == 0
    # Others see what the cluster tells them.
    cluster.program("search-r3", 'echo "[$TPU_PROCESS_BOUNDS] $TPU_WORKER_HOSTNAMES"')
    assert cluster.run("gke/entry.sh", "sft", TPU_WORKER_HOSTNAMES="a,b").stdout == "[] a,b\n"
