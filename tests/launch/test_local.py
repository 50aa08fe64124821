"""`local.sh` starts processes that find each other, passes on signals once, and ends with the status of the
one that failed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns, shown
from helpers.tiny_models import word_collection

from search_r3_jax.config import MeshConfig
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.distributed.spec import Cluster, explicit_cluster
from search_r3_jax.errors import UserError
from search_r3_jax.mesh import mesh_from_config

NAMES = (
    "SEARCH_R3_COORDINATOR",
    "SEARCH_R3_PROCESSES",
    "SEARCH_R3_PROCESS",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "NPROC",
)
ODD = ["sft", "--run", "a b", "q\"uo'te", "$(touch hacked)", "*", "ü", ""]
# Counts the signals that a process hears, until `go` is there or the test has gone wrong.
HEARS = """
trap 'echo heard; echo TERM >>heard-$SEARCH_R3_PROCESS' TERM
trap 'echo heard; echo INT >>heard-$SEARCH_R3_PROCESS' INT
echo ready
for ((left = 500; left; left--)); do [ ! -e go ] || exit 0; sleep 0.02; done
"""


@pytest.fixture
def machine(tmp_path: Path) -> StandIns:
    """A search-r3 that writes down what it was started with."""
    standins = StandIns(tmp_path)
    says = "; ".join(f'printf "%s\\0" "${{{name}:-}}"' for name in NAMES)
    standins.program(
        "search-r3",
        f'{{ {says}; printf "%s\\0" "$@"; }} >"started-$SEARCH_R3_PROCESS"\necho out; echo err >&2',
    )
    return standins


def started(folder: Path, process: int) -> list[str]:
    return (folder / f"started-{process}").read_text().split("\0")[:-1]


def background(machine: StandIns, *words: str) -> subprocess.Popen[str]:
    command = [str(machine.tools / "bash"), str(LAUNCH / "local.sh"), *words]
    # A session of its own, so that a signal can be sent to its group as a terminal does.
    return subprocess.Popen(
        command,
        cwd=machine.folder,
        env=machine.environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_processes_are_told_of_each_other(machine: StandIns, tmp_path: Path) -> None:
    done = machine.run("local.sh", "--processes", "3", "--devices=2", "--", *ODD, XLA_FLAGS="--xla_own=1")
    assert done.returncode == 0
    coordinators = set()
    for process in range(3):
        coordinator, *values = started(tmp_path, process)
        assert values == [
            "3",
            str(process),
            "cpu",
            "--xla_own=1 --xla_force_host_platform_device_count=2",
            "4",
            *ODD,
        ]
        coordinators.add(coordinator)
    (coordinator,) = coordinators
    host, port = coordinator.split(":")
    assert host == "localhost"
    with socket.socket() as free:
        free.bind((host, int(port)))
    assert sorted(done.stdout.splitlines()) == ["[1] err", "[1] out", "[2] err", "[2] out", "out"]
    assert done.stderr == "err\n"
    assert not (tmp_path / "hacked").exists()
    # One device needs no threads of its own.
    machine.run("local.sh", "--", "sft")
    assert started(tmp_path, 1)[1:] == [
        "2",
        "1",
        "cpu",
        "--xla_force_host_platform_device_count=1",
        "",
        "sft",
    ]


def test_a_dry_run_shows_what_would_be_started(machine: StandIns, tmp_path: Path) -> None:
    done = machine.run("local.sh", "--dry-run", "--devices", "2", "--", *ODD)
    assert not (tmp_path / "started-0").exists()
    for process, words in enumerate(shown(done.stdout)):
        assert words[:2] == ["env", f"{NAMES[0]}={words[1].split('=')[1]}"]
        settings = [
            "SEARCH_R3_PROCESSES=2",
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--xla_force_host_platform_device_count=2",
            "NPROC=4",
        ]
        assert words[2:] == [*settings, f"SEARCH_R3_PROCESS={process}", "search-r3", *ODD]


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ({0: "exit 0", 1: "exit 3"}, 3),
        ({0: "exit 75", 1: "sleep 0.3; exit 3"}, 3),
        ({0: "exit 75", 1: "exit 0"}, 75),
        ({1: "kill -9 $$"}, 137),
    ],
)
def test_the_status_is_that_of_the_process_that_failed(
    machine: StandIns, tmp_path: Path, ends: dict[int, str], status: int
) -> None:
    cases = "".join(f"{process}) {text} ;;\n" for process, text in ends.items())
    machine.program("search-r3", f'case "$SEARCH_R3_PROCESS" in\n{cases}esac\nsleep 0.5; echo waited for')
    done = machine.run("local.sh", "--processes", "3", "--restarts", "0", "--", "sft")
    assert done.returncode == status
    # The others end by themselves.
    assert "[2] waited for" in done.stdout


def test_what_passes_by_itself_is_tried_again(machine: StandIns, tmp_path: Path) -> None:
    machine.program("sleep", f'[ "$1" = 0.1 ] || echo "$1" >>{tmp_path}/sleeps')
    # Process 1 ends with 75 twice, then all is well.
    machine.program(
        "search-r3",
        'echo "$SEARCH_R3_COORDINATOR" >>"started-$SEARCH_R3_PROCESS"\n'
        '[ "$SEARCH_R3_PROCESS" = 1 ] || exit 0\n'
        "[ $(wc -l <started-1) -gt 2 ] || exit 75",
    )
    done = machine.run("local.sh", "--", "sft")
    assert done.returncode == 0
    assert (tmp_path / "sleeps").read_text().split() == ["10", "20"]
    assert done.stderr.splitlines() == [
        "local.sh: status 75, which passes by itself; all start again in 10 s (1 of 5)",
        "local.sh: status 75, which passes by itself; all start again in 20 s (2 of 5)",
    ]
    # All of them, together.
    first, second = ((tmp_path / f"started-{number}").read_text().split() for number in range(2))
    assert first == second
    assert len(first) == 3
    machine.program("search-r3", "exit 75")
    (tmp_path / "sleeps").unlink()
    assert machine.run("local.sh", "--restarts", "3", "--pause=100", "--", "sft").returncode == 75
    assert (tmp_path / "sleeps").read_text().split() == ["100", "200", "300"]


def test_a_mistake_ends_all_of_them(machine: StandIns, tmp_path: Path) -> None:
    machine.program(
        "search-r3",
        '[ "$SEARCH_R3_PROCESS" = 0 ] || { echo wrong >&2; exit 2; }\n'
        "trap 'echo heard >>heard; exit 75' TERM\nfor ((left = 500; left; left--)); do sleep 0.02; done",
    )
    done = machine.run("local.sh", "--", "sft")
    assert done.returncode == 2
    assert (tmp_path / "heard").read_text() == "heard\n"
    assert "[1] wrong" in done.stdout
    assert done.stderr == "local.sh: status 2: what it says above is to be mended, and is not tried again\n"


def test_a_signal_ends_the_pause(machine: StandIns) -> None:
    machine.program("search-r3", "echo over; exit 75")
    process = background(machine, "--processes", "1", "--pause", "300", "--", "sft")
    assert process.stdout is not None
    assert process.stdout.readline() == "over\n"
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=30) == 75


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_every_process_gets_what_stands_behind_the_dashes(
    machine: StandIns, tmp_path: Path, command: str
) -> None:
    words = [command, "--config", "smollm2", "--run", "r", "--mesh.fsdp", "4"]
    assert machine.run("local.sh", "--processes", "4", "--", *words).returncode == 0
    clusters = [started(tmp_path, process) for process in range(4)]
    assert [each[1:4] for each in clusters] == [["4", str(process), "cpu"] for process in range(4)]
    assert [each[6:] for each in clusters] == [words] * 4
    # It is what search-r3 takes for its cluster.
    for process, (coordinator, *_) in enumerate(clusters):
        found = explicit_cluster(Cluster(), dict(zip(NAMES, clusters[process], strict=False)))
        assert found == Cluster(coordinator=coordinator, processes=4, process=process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once(
    machine: StandIns, tmp_path: Path, number: signal.Signals
) -> None:
    machine.program("search-r3", HEARS)
    process = background(machine, "--", "sft")
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] ready\n", "ready\n"]
    # Ctrl-C goes to all that the terminal knows.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] heard\n", "heard\n"]
    # Long enough for a second one.
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert process.wait(timeout=30) == 0
    name = number.name.removeprefix("SIG")
    assert [(tmp_path / f"heard-{each}").read_text().split() for each in range(2)] == [[name], [name]]


def words_of(settings: dict[str, Any]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_two_processes_train_one_run(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    build_dataset(
        {"train": word_collection(documents=40, queries=20)}, data, name="words", source={"kind": "test"}
    )
    settings = {
        "config": "smollm2",
        "run": tmp_path / "run",
        "model": tiny_folders["llama"],
        "data.sets": data,
        "data.dev-queries": 0,
        "remat": "none",
        "text.max-query-tokens": 16,
        "text.max-document-tokens": 32,
        "lora.rank": 4,
        "mesh.data": 2,
        "sft.steps": 3,
        "sft.global-batch": 8,
        "sft.eval-every": 0,
        "sft.reasoned-share": 0,
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(LAUNCH.parent), "PATH": path}
    command = ["bash", str(LAUNCH / "local.sh"), "--processes", "2", "--", "sft", *words_of(settings)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    # Process 0 speaks, for both.
    assert "run: done; " in done.stdout
    # Of a mesh over two devices each process has one: neither could have trained alone.
    with pytest.raises(UserError):
        mesh_from_config(MeshConfig(data=2))
