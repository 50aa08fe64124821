"""`slurm.sh` submits itself, runs search-r3 without a shell between, and queues itself again when the time
limit has stopped it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns, shown

ODD = ["sft", "--run", "a b", "q\"uo'te", "$(touch hacked)", "`id`", "*", "ü", ""]
STOPPED = (
    "search-r3: r: stopped and saved at step 7, 1.0 s after the signal; the same command goes on from there\n"
)
JOB = {"SLURM_JOB_ID": "17"}
STEP = ["--kill-on-bad-exit=0", "search-r3"]


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    standins = StandIns(tmp_path)
    for tool in ("sbatch", "srun", "scontrol", "search-r3"):
        standins.add(tool)
    return standins


def test_it_submits_itself(cluster: StandIns) -> None:
    script = str(LAUNCH / "slurm.sh")
    assert cluster.run("slurm.sh", "--", *ODD).returncode == 0
    assert cluster.calls("sbatch")[-1] == [
        "--nodes=1",
        "--gpus-per-node=1",
        "--ntasks-per-node=1",
        script,
        "--attempts",
        "3",
        "--pause",
        "10",
        "--",
        *ODD,
    ]
    flags = (
        "--nodes 2 --gpus=8 --tasks gpu --cpus 6 --time 1-00:00 --partition gpu --account a --attempts 5 "
        "--pause 2 --sbatch=--constraint=a100"
    )
    assert cluster.run("slurm.sh", *flags.split(), "--sbatch", "--comment=a b", "--", *ODD).returncode == 0
    asked = [
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--cpus-per-task=6",
        "--time=1-00:00",
        "--partition=gpu",
        "--account=a",
    ]
    assert cluster.calls("sbatch")[-1] == [
        *asked,
        "--constraint=a100",
        "--comment=a b",
        script,
        "--attempts",
        "5",
        "--pause",
        "2",
        "--",
        *ODD,
    ]
    assert cluster.calls("srun") == []


def test_what_the_job_asks_of_slurm_stands_in_the_script() -> None:
    head = (LAUNCH / "slurm.sh").read_text().split("set -euo pipefail")[0].splitlines()
    # SLURM reads these up to the first command.
    assert {"#SBATCH --signal=USR1@180", "#SBATCH --requeue", "#SBATCH --open-mode=append"} < set(head)


def test_a_finished_run_ends_the_job(cluster: StandIns) -> None:
    cluster.answer("srun", "", out="step 1\ndone\n")
    done = cluster.run("slurm.sh", "--", *ODD, **JOB)
    assert (done.returncode, done.stdout) == (0, "step 1\ndone\n")
    assert cluster.calls("srun") == [[*STEP, *ODD]]
    assert cluster.calls("scontrol") == []


def test_a_stopped_run_is_queued_again(cluster: StandIns) -> None:
    cluster.answer("srun", "", out=STOPPED + STOPPED)
    assert cluster.run("slurm.sh", "--attempts", "3", "--", *ODD, **JOB).returncode == 0
    assert cluster.calls("srun") == [[*STEP, *ODD]]
    assert cluster.calls("scontrol") == [["requeue", "17"]]


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [((75, 137, 0), 3, 0), ((75, 75, 75), 3, 75), ((1,), 1, 1), ((2,), 1, 2)],
)
def test_a_process_that_died_starts_all_of_them_again(
    cluster: StandIns, tmp_path: Path, statuses: tuple[int, ...], starts: int, status: int
) -> None:
    cluster.program("sleep", f'echo "$1" >>{tmp_path}/sleeps')
    for each in statuses:
        cluster.answer("srun", "", status=each)
    done = cluster.run("slurm.sh", "--", *ODD, **JOB)
    assert done.returncode == status
    assert cluster.calls("srun") == [[*STEP, *ODD]] * starts
    assert cluster.calls("scontrol") == []
    sleeps = (tmp_path / "sleeps").read_text().split() if starts > 1 else []
    assert sleeps == ["10", "20"][: starts - 1]
    assert ("status 2: what it says above is to be mended" in done.stdout) == (status == 2)


def test_a_mistake_of_one_process_is_not_hidden_by_the_others(cluster: StandIns) -> None:
    cluster.answer("srun", "", err="srun: error: node1: task 3: Exited with exit code 2\n", status=75)
    assert cluster.run("slurm.sh", "--", *ODD, **JOB).returncode == 2
    assert len(cluster.calls("srun")) == 1


def test_a_pause_that_outlasts_the_job_is_left_to_the_next_one(cluster: StandIns) -> None:
    cluster.answer("srun", "", status=75)
    end = str(int(time.time()) + 185)
    assert cluster.run("slurm.sh", "--", *ODD, **JOB, SLURM_JOB_END_TIME=end).returncode == 0
    assert len(cluster.calls("srun")) == 1
    assert cluster.calls("scontrol") == [["requeue", "17"]]


def test_a_process_drives_the_gpus_that_are_its_own(cluster: StandIns) -> None:
    def devices(**job: str) -> str:
        cluster.run("slurm.sh", "--", "sft", **JOB, **job)
        return cluster.records("srun")[-1][1]

    assert devices(SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4") == "0,1,2,3"
    assert devices(SLURM_GPUS_ON_NODE="1") == "0"
    # A process for each GPU: JAX takes the one of the process's number.
    assert devices(SLURM_NTASKS_PER_NODE="4", SLURM_GPUS_ON_NODE="4") == ""
    assert devices() == ""
    devices(SLURM_CPUS_PER_TASK="6")
    assert cluster.calls("srun")[-1] == ["--kill-on-bad-exit=0", "--cpus-per-task=6", "search-r3", "sft"]


def test_a_dry_run_shows_both_commands(cluster: StandIns) -> None:
    done = cluster.run("slurm.sh", "--gpus", "4", "--dry-run", "--", *ODD)
    assert done.returncode == 0
    submit, step = shown(done.stdout)
    assert cluster.calls("sbatch") == cluster.calls("srun") == []
    cluster.run("slurm.sh", "--gpus", "4", "--", *ODD)
    cluster.run("slurm.sh", "--", *ODD, **JOB)
    assert [submit, step] == [["sbatch", *cluster.calls("sbatch")[0]], ["srun", *cluster.calls("srun")[0]]]
