"""What runs on the workers of a slice: detached from who started it, told apart when it ends, each host of an
indexer on its own chips."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns
from helpers.fake_cloud_tools import ODD_ARGUMENTS as ODD
from helpers.fake_cloud_tools import TPU_FLAGS as FLAGS

# They use sessions, locks and /proc as only Linux has them.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a worker is a Linux machine")


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    """No wait between two looks, and a gcloud."""
    standins = StandIns(tmp_path)
    standins.add("gcloud")
    return standins


class Workers:
    """Two homes with the sources and a search-r3 that does as it is told, behind a gcloud that runs what it
    is given there."""

    def __init__(self, cloud: StandIns, folder: Path):
        self.cloud, self.homes = cloud, (folder / "worker0", folder / "worker1")
        for home in self.homes:
            shutil.copytree(LAUNCH, home / "search_r3_jax/launch")
            (home / "search_r3_jax/.venv/bin").mkdir(parents=True)
        cloud.answer("gcloud", "--worker=all", homes=self.homes)
        cloud.answer("gcloud", "--worker=0", homes=self.homes[:1])
        self.trains("exit 0")

    def trains(self, *texts: str) -> None:
        for home, text in zip(self.homes, texts * 2, strict=False):
            program = home / "search_r3_jax/.venv/bin/search-r3"
            program.write_text(f"#!{shutil.which('bash')}\nprintf '%s\\0' \"$@\" >>~/arguments\n{text}\n")
            program.chmod(0o755)

    def stop(self, worker: int) -> subprocess.Popen[bytes]:
        """What `tpu_vm.sh stop` runs on one of them."""
        home = self.homes[worker]
        command = ["bash", "search_r3_jax/launch/tpu_worker.sh", "stop"]
        return subprocess.Popen(command, cwd=home, env=self.cloud.environment({"HOME": str(home)}))

    def states(self, *, until: str = "") -> list[str]:
        """Each worker's state, once `until` is no longer among them."""
        for _ in range(100):
            printed = self.cloud.run("tpu_vm.sh", "status", *FLAGS).stdout
            states = [line.split(": ")[1] for line in printed.splitlines() if line.startswith("worker ")]
            if until not in states:
                break
            time.sleep(0.05)
        return states


def test_workers_run_detached_and_tell_how_it_ended(cloud: StandIns, tmp_path: Path) -> None:
    workers = Workers(cloud, tmp_path)
    assert workers.states() == ["idle", "idle"]
    seen = "read -a stat </proc/$$/stat; echo ${stat[5]} >~/session; echo $HF_TOKEN >~/token; "
    wait = (
        seen + "echo step 1; for ((left = 400; left; left--)); do [ ! -e ~/go ] || break; sleep 0.05; done; "
    )
    workers.trains(wait + "echo all good; exit 0", wait + "exit 75")
    (workers.homes[0] / ".search_r3.env").write_text("# mine\nHF_TOKEN=$(touch hacked) 'x'\n")
    assert cloud.run("tpu_vm.sh", "run", *FLAGS, "--", *ODD).returncode == 0
    # `run` has ended, the run has not; asked for again it goes on, asked for something else it says no.
    assert workers.states() == ["running", "running"]
    again = cloud.run("tpu_vm.sh", "run", *FLAGS, "--", *ODD)
    assert again.stdout.count("runs already") == 2
    assert cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "rl").returncode == 2
    for home in workers.homes:
        (home / "go").touch()
    assert workers.states(until="running") == ["finished", "ended 75"]
    # A connection that is lost ends its own session only.
    assert {int((home / "session").read_text()) for home in workers.homes}.isdisjoint({os.getsid(0)})
    for home in workers.homes:
        assert (home / "arguments").read_text().split("\0")[:-1] == ODD
    assert (workers.homes[0] / "token").read_text() == "$(touch hacked) 'x'\n"
    assert not (workers.homes[0] / "hacked").exists()
    assert cloud.run("tpu_vm.sh", "logs", *FLAGS).stdout == "step 1\nall good\n"


def test_a_run_that_was_stopped_or_lost_is_not_finished(cloud: StandIns, tmp_path: Path) -> None:
    workers = Workers(cloud, tmp_path)
    saved = (
        "search-r3: r: stopped and saved at step 7, 1.0 s after the signal; the same command goes on "
        "from there"
    )
    trains = "touch ~/trains; for ((left = 400; left; left--)); do sleep 0.05; done"
    workers.trains(f"trap 'echo \"{saved}\"; exit 0' TERM; {trains}", "kill -9 $PPID")
    cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "sft")
    for _ in range(200):
        if (workers.homes[0] / "trains").exists() and workers.states() == ["running", "lost"]:
            break
        time.sleep(0.05)
    assert workers.stop(0).wait(timeout=60) == 0
    assert workers.states(until="running") == ["stopped", "lost"]
    # What an earlier attempt said does not count for the next.
    workers.trains("exit 0")
    cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "sft")
    assert workers.states(until="running") == ["finished", "finished"]


def test_a_run_that_has_just_been_started_can_be_stopped(cloud: StandIns, tmp_path: Path) -> None:
    workers = Workers(cloud, tmp_path)
    workers.trains("exit 0")
    cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "sft")
    assert workers.states(until="running") == ["finished", "finished"]
    assert workers.stop(0).wait(timeout=60) == 2
    # The next run reads its secrets first, here until somebody has written them.
    secrets = workers.homes[0] / ".search_r3.env"
    os.mkfifo(secrets)
    workers.trains("for ((left = 400; left; left--)); do sleep 0.05; done")
    cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "sft")
    stop = workers.stop(0)
    with pytest.raises(subprocess.TimeoutExpired):
        stop.wait(timeout=0.5)
    secrets.write_text("NAME=value\n")
    assert stop.wait(timeout=60) == 0
    assert workers.stop(1).wait(timeout=60) == 0
    assert workers.states(until="running") == ["ended 143", "ended 143"]


def test_each_worker_of_an_indexer_is_a_world_of_its_own(cloud: StandIns, tmp_path: Path) -> None:
    workers = Workers(cloud, tmp_path)
    names = (
        "TPU_PROCESS_BOUNDS",
        "TPU_CHIPS_PER_PROCESS_BOUNDS",
        "TPU_VISIBLE_CHIPS",
        "TPU_PROCESS_ADDRESSES",
    )
    workers.trains(f"echo {' '.join(f'${name}' for name in names)} >~/world")
    # Two slices of two hosts each; these are the second host of the first and the first of the second.
    description = "ACCELERATOR_TYPE: 'v5litepod-16'\nCHIPS_PER_HOST_BOUNDS: '{}'\nMEGASCALE_NUM_SLICES: '2'\n"
    for home, slice_id, worker, bounds in zip(workers.homes, "01", "10", ("2,2,1", "2,4,1"), strict=True):
        text = description.format(bounds) + f"MEGASCALE_SLICE_ID: '{slice_id}'\n"
        (home / "tpu-env").write_text(text)
        (home / "agent-worker-number").write_text(worker)
        (home / "worker-network-endpoints").write_text("a:1:10.0.0.1,b:2:10.0.0.2")
    cloud.program("curl", 'for last; do :; done; cat "$HOME/${last##*/}"')
    run = tmp_path / "share/rl"
    assert cloud.run("tpu_vm.sh", "run", *FLAGS, "--", "indexer", "--run", run).returncode == 0
    # The trainer has not made it yet.
    for _ in range(100):
        logs = [home / "search_r3_run/log.txt" for home in workers.homes]
        if all(log.exists() and "waiting for" in log.read_text() for log in logs):
            break
        time.sleep(0.05)
    assert workers.states() == ["running", "running"]
    assert not any((home / "arguments").exists() for home in workers.homes)
    run.mkdir(parents=True)
    (run / "config.json").touch()
    assert workers.states(until="running") == ["finished", "finished"]
    arguments = [(home / "arguments").read_text().split("\0")[:-1] for home in workers.homes]
    asked = ["indexer", "--run", str(run), "--process"]
    assert arguments == [[*asked, "1", "--processes", "4"], [*asked, "2", "--processes", "4"]]
    assert [(home / "world").read_text() for home in workers.homes] == [
        "1,1,1 2,2,1 0,1,2,3 localhost:8476\n",
        "1,1,1 2,4,1 0,1,2,3,4,5,6,7 localhost:8476\n",
    ]


def test_a_worker_installs_with_a_python_that_is_new_enough(cloud: StandIns, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "search_r3_jax/launch")
    for name in ("setup.cfg", "requirements.txt", "pyproject.toml"):
        shutil.copy(LAUNCH.parent / name, home / "search_r3_jax")
    cloud.add("sudo")
    for tool in ("mountpoint", "mount.nfs"):
        cloud.program(tool, "exit 1")
    cloud.program("made", f'printf "%s\\n" "$*" >>{tmp_path}/pip.txt')
    enter = 'printf "VIRTUAL_ENV=$PWD/$3; PATH=$PWD/$3/bin:$PATH" >"$3/bin/activate"'
    cloud.program("python3.12", f'mkdir -p "$3/bin"; cp {cloud.tools}/made "$3/bin/python"; {enter}')
    cloud.program("uv", f'[ "$2" = install ] || echo {cloud.tools}/python3.12')
    command = ["bash", "search_r3_jax/launch/tpu_worker.sh", "install", "10.0.0.2:/runs"]
    done = subprocess.run(
        command, cwd=home, env=cloud.environment({"HOME": str(home)}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert cloud.calls("sudo") == [
        ["mkdir", "-p", "/mnt/search-r3"],
        ["mount", "-t", "nfs", "10.0.0.2:/runs", "/mnt/search-r3"],
        ["chmod", "a+rwx", "/mnt/search-r3"],
    ]
    assert (tmp_path / "pip.txt").read_text().splitlines()[
        -1
    ] == "-m pip install -qq --constraint requirements.txt --editable .[tpu]"
