"""`tpu_vm.sh` asks for exactly what it says, comes back after a preemption, and tells a finished run from a
stopped one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns, shown
from helpers.fake_cloud_tools import ODD_ARGUMENTS as ODD
from helpers.fake_cloud_tools import TPU_FLAGS as FLAGS

PLACE = ["--project=p", "--zone=us-east5-a", "--quiet"]
CREATE = ["compute", "tpus", "queued-resources", "create", "search-r3", "--node-id=search-r3"]
DELETE = ["compute", "tpus", "queued-resources", "delete", "search-r3", "--force", *PLACE]
DESCRIBE = [
    "compute",
    "tpus",
    "queued-resources",
    "describe",
    "search-r3",
    "--format=value(state.state)",
    *PLACE,
]
STATE, STATUS, LOG, START = (
    "queued-resources describe",
    "tpu_worker.sh status",
    "tpu_worker.sh log",
    "tpu_worker.sh start",
)


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    """No wait between two looks, and a gcloud."""
    standins = StandIns(tmp_path)
    standins.add("gcloud")
    return standins


def report(*states: str) -> str:
    return "".join(f"worker w-{number}: {state}\n" for number, state in enumerate(states))


def verbs(cloud: StandIns) -> list[str]:
    """What was done, in short."""
    return [words[3] for words in cloud.calls("gcloud")]


def command_of(words: list[str]) -> str:
    return next(word for word in words if word.startswith("--command="))


def starts(cloud: StandIns) -> int:
    return sum(START in " ".join(words) for words in cloud.calls("gcloud"))


def test_a_slice_is_asked_for_by_type(cloud: StandIns) -> None:
    for kind, runtime in {
        "v5litepod-16": "v2-alpha-tpuv5-lite",
        "v6e-16": "v2-alpha-tpuv6e",
        "v5p-32": "v2-alpha-tpuv5",
        "v4-32": "tpu-ubuntu2204-base",
    }.items():
        assert cloud.run("tpu_vm.sh", "create", *FLAGS, "--type", kind).returncode == 0
        assert cloud.calls("gcloud")[-1] == [
            *CREATE,
            f"--accelerator-type={kind}",
            f"--runtime-version={runtime}",
            "--async",
            *PLACE,
        ]
    cloud.run("tpu_vm.sh", "create", *FLAGS, "--type=tpu7x-16", "--runtime=own", "--spot", "--name=other")
    own = [
        "other",
        "--node-id=other",
        "--accelerator-type=tpu7x-16",
        "--runtime-version=own",
        "--spot",
        "--async",
    ]
    assert cloud.calls("gcloud")[-1] == [*CREATE[:4], *own, *PLACE]
    unknown = cloud.run("tpu_vm.sh", "create", *FLAGS, "--type", "tpu7x-16")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    # Where nothing is said, gcloud's own settings hold.
    cloud.run("tpu_vm.sh", "delete")
    assert cloud.calls("gcloud")[-1] == [*DELETE[:6], "--quiet"]


def test_arguments_reach_the_worker_as_they_are(cloud: StandIns, tmp_path: Path) -> None:
    assert cloud.run("tpu_vm.sh", "run", *FLAGS, "--", *ODD).returncode == 0
    *head, command = [word for word in cloud.calls("gcloud")[-1] if word not in PLACE]
    assert head == ["compute", "tpus", "queued-resources", "ssh", "search-r3", "--node=all", "--worker=all"]
    # gcloud takes the command apart at spaces, ssh joins it again, and a shell reads it.
    text = " ".join(command.removeprefix("--command=").split(" "))
    read = subprocess.run(
        ["bash", "-c", f"set -- {text}; printf '%s\\0' \"$@\""], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert read.decode().split("\0")[:-1] == ["bash", "search_r3_jax/launch/tpu_worker.sh", "start", *ODD]
    assert not (tmp_path / "hacked").exists()


def test_waiting_ends_when_the_slice_is_there_or_gone(cloud: StandIns) -> None:
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        cloud.answer("gcloud", STATE, out=f"{state}\n")
    assert cloud.run("tpu_vm.sh", "wait", *FLAGS).returncode == 0
    assert cloud.calls("gcloud") == [DESCRIBE] * 3
    for state in ("SUSPENDED", "FAILED"):
        cloud.add("gcloud")
        cloud.answer("gcloud", STATE, out=state)
        ended = cloud.run("tpu_vm.sh", "wait", *FLAGS)
        assert ended.returncode == 1
        assert state in ended.stdout
    # One that nobody can tell of is asked for again, and not for ever.
    cloud.add("gcloud")
    cloud.answer("gcloud", STATE, err="ERROR: no network\n", status=1)
    ended = cloud.run("tpu_vm.sh", "wait", *FLAGS)
    assert ended.returncode == 1
    assert "no network" in ended.stderr


def test_sources_and_secrets_are_copied_not_told(cloud: StandIns, tmp_path: Path) -> None:
    secrets = tmp_path / "own.env"
    secrets.write_text("HF_TOKEN=hf_TopSecretTopSecretTopSecret\n")
    cloud.program("tar", f'printf "%s\\n" "$*" >>{tmp_path}/tar.txt')
    done = cloud.run("tpu_vm.sh", "install", *FLAGS, "--env-file", "own.env", "--nfs", "10.0.0.2:/runs")
    assert done.returncode == 0, done.stderr
    packed = (tmp_path / "tar.txt").read_text().split()
    assert packed[:1] + packed[2:] == [
        *["-czf", "-C"],
        str(LAUNCH.parent),
        *(f"--exclude={name}" for name in (".git", ".venv", "./runs", "*.env")),
        ".",
    ]
    sources, unpack, environment, install = cloud.calls("gcloud")
    scp, everywhere = ["compute", "tpus", "queued-resources", "scp"], ["--node=all", "--worker=all"]
    assert sources == [*scp, packed[1], "search-r3:search_r3_jax.tar.gz", *everywhere, *PLACE]
    assert environment == [*scp, str(secrets), "search-r3:.search_r3.env", *everywhere, *PLACE]
    ssh = ["compute", "tpus", "queued-resources", "ssh", "search-r3", *everywhere]
    assert unpack == [
        *ssh,
        "--command=mkdir -p search_r3_jax && tar -xzf search_r3_jax.tar.gz -C search_r3_jax",
        *PLACE,
    ]
    assert install == [
        *ssh,
        "--command=bash search_r3_jax/launch/tpu_worker.sh install 10.0.0.2:/runs",
        *PLACE,
    ]
    cloud.run("tpu_vm.sh", "install", *FLAGS, "--repo", "https://example.org/r3.git")
    assert "git clone --quiet https://example.org/r3.git search_r3_jax" in " ".join(cloud.calls("gcloud")[-2])
    assert "TopSecret" not in json.dumps(cloud.calls("gcloud")) + done.stdout + done.stderr


def test_up_goes_all_the_way(cloud: StandIns) -> None:
    # Listed a moment after it was asked for.
    for _ in range(3):
        cloud.answer("gcloud", STATE, err="ERROR: NOT_FOUND: Resource was not found\n", status=1)
    for state in ("PROVISIONING", "ACTIVE"):
        cloud.answer("gcloud", STATE, out=state)
    cloud.answer("gcloud", LOG, out="3\nstep 1\nstep 2\n")
    cloud.answer("gcloud", LOG, out="4\n  done\n")
    # Nothing is there yet that could say how it is.
    cloud.answer(
        "gcloud",
        STATUS,
        err="bash: search_r3_jax/launch/tpu_worker.sh: No such file or directory\n",
        status=127,
    )
    for states in (("running", "running"), ("running", "finished"), ("finished", "finished")):
        cloud.answer("gcloud", STATUS, out="ssh: a banner\n" + report(*states))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "sft", "--run", "r")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud)[:8] == ["describe", "create", *["describe"] * 4, "ssh", "scp"]
    assert starts(cloud) == 1
    assert "delete" not in verbs(cloud)
    assert "step 1\nstep 2\n  done\n" in done.stdout
    # Each line is asked for once.
    asked = [command_of(words).split()[-1] for words in cloud.calls("gcloud") if LOG in " ".join(words)]
    assert asked == ["0", "3", "4"]


@pytest.mark.parametrize("gone", ["SUSPENDED", "FAILED", "PREEMPTED"])
def test_a_slice_that_was_taken_away_is_asked_for_again(cloud: StandIns, gone: str) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATE, out="ACTIVE")
    if gone == "PREEMPTED":
        # The queued resource is active still, its machines are not there.
        cloud.answer("gcloud", STATE, out="ACTIVE")
        cloud.answer("gcloud", STATE, out="ACTIVE")
        for node in ("READY", "PREEMPTED", "PREEMPTED", "READY"):
            cloud.answer("gcloud", "tpu-vm describe", out=node)
    else:
        # The service takes its time.
        for state in ("SUSPENDING", "SUSPENDING", gone):
            cloud.answer("gcloud", STATE, out=state)
    cloud.answer("gcloud", STATE, err="ERROR: NOT_FOUND\n", status=1)
    cloud.answer("gcloud", STATE, out="ACTIVE")
    for states in (("idle", "idle"), ("running", "running")):
        cloud.answer("gcloud", STATUS, out=report(*states))
    # Not when it is gone, nor when it is there again.
    for _ in range(2):
        cloud.answer("gcloud", STATUS, err="ssh: connect: timed out\n", status=255)
    cloud.answer("gcloud", STATUS, out=report("finished", "finished"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--spot", "--", *ODD)
    assert done.returncode == 0, done.stdout + done.stderr
    done_in_order = [verb for verb in verbs(cloud) if verb in ("create", "delete")]
    assert done_in_order == ["delete", "create"]
    made = next(words for words in cloud.calls("gcloud") if "create" in words)
    assert made == [
        *CREATE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--async",
        *PLACE,
    ]
    assert DELETE in cloud.calls("gcloud")
    # The same command, word for word.
    commands = [command_of(words) for words in cloud.calls("gcloud") if START in " ".join(words)]
    assert len(commands) == 2
    assert commands[0] == commands[1]


def test_a_run_of_which_a_process_died_starts_again_on_all_workers(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("idle", "idle"))
    cloud.answer("gcloud", STATUS, out=report("ended 75", "running"))
    for states in (
        ("finished", "ended 75"),
        ("ended 137", "finished"),
        ("lost", "ended 75"),
        ("stopped", "stopped"),
    ):
        # Once while it is followed, once before it is started.
        for _ in range(2):
            cloud.answer("gcloud", STATUS, out=report(*states))
    cloud.answer("gcloud", STATUS, out=report("finished", "finished"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert starts(cloud) == 5
    assert all("--worker=all" in words for words in cloud.calls("gcloud") if START in " ".join(words))
    assert {"create", "delete"}.isdisjoint(verbs(cloud))


@pytest.mark.parametrize(
    ("states", "status", "count"),
    [(("ended 1", "finished"), 1, 1), (("ended 75",) * 2, 75, 3)],
)
def test_what_another_start_does_not_mend_ends_it(
    cloud: StandIns, states: tuple[str, ...], status: int, count: int
) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report(*states))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--restarts", "2", "--", "sft")
    assert done.returncode == status
    assert starts(cloud) == count
    assert states[0] in done.stdout


def test_a_mistake_stops_the_other_workers_and_is_told(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("idle", "idle"))
    # The other one waits for the one that has gone.
    cloud.answer("gcloud", STATUS, out=report("ended 2", "running"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "sft")
    assert done.returncode == 2
    assert starts(cloud) == 1
    assert "status 2: what it says above is to be mended, and is not tried again" in done.stdout
    assert command_of(cloud.calls("gcloud")[-1]).endswith("tpu_worker.sh stop")


@pytest.mark.slow
def test_pauses_double_up_to_five_minutes(cloud: StandIns, tmp_path: Path) -> None:
    cloud.program("sleep", f'echo "$1" >>{tmp_path}/sleeps')
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("ended 75", "ended 75"))
    flags = ["--project", "p", "--zone", "z", "--poll", "0", "--restarts", "7"]
    assert cloud.run("tpu_vm.sh", "up", *flags, "--", "sft").returncode == 75
    assert starts(cloud) == 8
    pauses = [line for line in (tmp_path / "sleeps").read_text().splitlines() if line != "0"]
    assert pauses == ["10", "20", "40", "80", "160", "300", "300"]


def test_network_and_account_reach_create_and_ssh(cloud: StandIns, tmp_path: Path) -> None:
    flags = (
        "--network projects/p/global/networks/n --subnetwork s --internal-ips --tunnel-through-iap "
        "--service-account r3@p.iam.gserviceaccount.com --boot-disk kms-key=k,size=200 --reserved"
    )
    options = [*flags.split(), "--create-option=--tags=a,b", "--create-option", "--scopes=cloud-platform"]
    cloud.run("tpu_vm.sh", "create", *FLAGS, *options)
    assert cloud.calls("gcloud")[-1] == [
        *CREATE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--network=projects/p/global/networks/n",
        "--subnetwork=s",
        "--internal-ips",
        "--service-account=r3@p.iam.gserviceaccount.com",
        "--boot-disk=kms-key=k,size=200",
        "--reserved",
        "--tags=a,b",
        "--scopes=cloud-platform",
        "--async",
        *PLACE,
    ]
    (tmp_path / "e.env").write_text("A=1\n")
    for reach in ("--tunnel-through-iap", "--internal-ip"):
        cloud.add("gcloud")
        (tmp_path / "gcloud.calls").unlink()
        for action in ("install", "status", "stop", "logs"):
            cloud.run("tpu_vm.sh", action, *FLAGS, reach, "--env-file", "e.env")
        cloud.run("tpu_vm.sh", "run", *FLAGS, reach, "--", "sft")
        called = cloud.calls("gcloud")
        assert [words[3] for words in called] == ["scp", "ssh", "scp", "ssh", "describe", *["ssh"] * 4]
        assert all((reach in words) == (words[3] != "describe") for words in called)


def test_several_slices_are_one_run(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, err="NOT_FOUND", status=1)
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("idle", "idle"))
    # Of the second slice the machines are gone.
    cloud.answer("gcloud", STATUS, out=report("ended 75"), status=255)
    cloud.answer("gcloud", "describe search-r3-0", out="READY")
    cloud.answer("gcloud", "describe search-r3-1", out="PREEMPTED")
    cloud.answer("gcloud", "describe search-r3-1", out="READY")
    cloud.answer("gcloud", STATUS, out=report("finished", "finished"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--slices", "2", "--", "sft", "--run", "r")
    assert done.returncode == 0, done.stdout + done.stderr
    made = next(words for words in cloud.calls("gcloud") if "create" in words)
    assert made[5:7] == ["--node-count=2", "--node-prefix=search-r3"]
    assert "FAILED" in done.stdout
    started = [command_of(words) for words in cloud.calls("gcloud") if START in " ".join(words)]
    assert started[0].endswith("start sft --run r --mesh.slice 2")
    cloud.run("tpu_vm.sh", "logs", *FLAGS, "--slice", "1", "--worker", "3")
    assert cloud.calls("gcloud")[-1][5:7] == ["--node=1", "--worker=3"]
    # What the mesh says already is not said again; nothing of it belongs to other commands.
    for words in (["rl", "--mesh.slice=2"], ["rl", "--mesh.slice", "2"], ["indexer", "--run", "r"]):
        cloud.run("tpu_vm.sh", "run", *FLAGS, "--slices", "2", "--", *words)
        assert command_of(cloud.calls("gcloud")[-1]).endswith(f"start {' '.join(words)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--internal-ips"], "--internal-ips: ssh needs a way in; add --tunnel-through-iap"),
        (["create", "--spot", "--reserved"], "--reserved: --spot is given, too"),
        (["create", "--tunnel-through-iap", "--internal-ip"], "--internal-ip: --tunnel-through-iap is given"),
        (["create", "--boot-disk", "large"], "--boot-disk: 'large': KEY=VALUE"),
        (["create", "--create-option", "tags"], "--create-option: 'tags': an option of gcloud"),
        (["create", "--network", "a b"], "--network: 'a b'"),
        (["create", "--service-account=-x"], "--service-account: '-x'"),
        (["create", "--slices", "0"], "--slices: at least 1"),
        (["create", "--pause", "x"], "--pause: 'x': not a whole number"),
        (
            ["up", "--slices", "2", "--", "sft", "--mesh.slice", "4"],
            "--mesh.slice: 4: it has to be the number",
        ),
        (["up", "--", "rl", "--mesh.slice=2"], "--mesh.slice: 2: it has to be the number of slices, 1"),
        (["up", "--", "indexer"], "--run: missing; the run that the indexer follows"),
        (["up", "--", "indexer", "--run", "r", "--processes=4"], "--processes: each host of the slices gets"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_rented(
    cloud: StandIns, words: list[str], message: str
) -> None:
    done = cloud.run("tpu_vm.sh", words[0], *FLAGS, *words[1:])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"tpu_vm.sh: {message}")
    assert cloud.calls("gcloud") == []


def test_of_an_indexer_the_worker_that_died_starts_again(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("idle", "idle"))
    # Once while it is followed, once before it is started: the other one has never stopped.
    for states in (("running", "running"), ("lost", "running"), ("lost", "running")):
        cloud.answer("gcloud", STATUS, out=report(*states))
    cloud.answer("gcloud", STATUS, out=report("ended 2", "running"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "indexer", "--run", "r")
    assert done.returncode == 2, done.stdout + done.stderr
    assert starts(cloud) == 2
    # The sources of those that run stay as they are.
    assert verbs(cloud).count("scp") == 1


def test_a_run_that_is_under_way_is_taken_up_as_it_is(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    for states in (("running", "running"), ("finished", "finished")):
        cloud.answer("gcloud", STATUS, out=report(*states))
    assert cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "sft").returncode == 0
    # Its sources stay; whether it is this run the workers say.
    assert "scp" not in verbs(cloud)
    assert starts(cloud) == 1


def test_a_worker_that_does_not_answer_is_waited_for(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("idle", "idle"))
    cloud.answer("gcloud", STATUS, out=report("finished"), status=255)
    cloud.answer("gcloud", STATUS, out=report("finished", "finished"))
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--", "sft")
    assert done.returncode == 0
    assert "not every worker answers" in done.stdout
    assert starts(cloud) == 1


def test_a_slice_that_never_comes_is_given_up(cloud: StandIns) -> None:
    cloud.answer("gcloud", STATE, out="FAILED")
    for state in ("x", "FAILED"):
        cloud.answer(
            "gcloud", STATE, out=state, err="NOT_FOUND" if state == "x" else "", status=int(state == "x")
        )
    for _ in range(9):
        cloud.answer("gcloud", STATE, err="NOT_FOUND", status=1)
        cloud.answer("gcloud", STATE, out="FAILED")
    assert cloud.run("tpu_vm.sh", "up", *FLAGS, "--restarts", "2", "--", "sft").returncode == 1
    assert verbs(cloud).count("create") == 3
    assert starts(cloud) == 0


def test_a_dry_run_shows_the_commands_it_would_run(cloud: StandIns, tmp_path: Path) -> None:
    (tmp_path / "e.env").write_text("HF_TOKEN=hf_TopSecretTopSecretTopSecret")
    done = cloud.run("tpu_vm.sh", "up", *FLAGS, "--env-file", "e.env", "--dry-run", "--", *ODD)
    assert (done.returncode, done.stderr, cloud.calls("gcloud")) == (0, "", [])
    printed = shown(done.stdout)
    assert [words[0] for words in printed] == ["gcloud"] * 4 + ["tar"] + ["gcloud"] * 7
    # What it shows is what it does.
    cloud.answer("gcloud", STATE, err="NOT_FOUND", status=1)
    cloud.answer("gcloud", STATE, out="ACTIVE")
    cloud.answer("gcloud", STATUS, out=report("finished"))
    assert cloud.run("tpu_vm.sh", "up", *FLAGS, "--env-file", "e.env", "--", *ODD).returncode == 0
    without_scratch = [
        [word if "sources.tar.gz" not in word else "sources" for word in words]
        for words in (w[1:] for w in printed if w[0] == "gcloud")
    ]
    assert without_scratch == [
        [word if "sources.tar.gz" not in word else "sources" for word in words]
        for words in cloud.calls("gcloud")
    ]
