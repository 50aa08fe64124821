"""`gke/submit.sh` fills in manifests that Kubernetes reads as they were meant; a stopped run does not pass
for a finished one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.fake_cloud_tools import LAUNCH, StandIns, shown

FLAGS = ["--image", "us-docker.pkg.dev/p/r/search-r3:1", "--claim", "runs"]
ODD = [
    "sft",
    "--run",
    "/mnt/search-r3/a b",
    "q\"uo'te",
    "$(touch hacked)",
    "$HOME",
    "$$",
    "{{name}}",
    "#: - x",
    "ü",
    "",
    "17",
    "true",
]
SAVED = (
    "search-r3: r: stopped and saved at step 7, 1.0 s after the signal; the same command goes on from there"
)


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    standins = StandIns(tmp_path)
    standins.add("kubectl", reads=True)
    return standins


def submitted(cluster: StandIns, *words: str) -> list[dict[str, Any]]:
    """The manifests that kubectl was given."""
    done = cluster.run("gke/submit.sh", *words)
    assert done.returncode == 0, done.stderr
    arguments, _, text = cluster.records("kubectl")[-1]
    assert arguments == ["apply", "--filename=-"]
    return list(yaml.safe_load_all(text))


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    job = manifest["spec"]["replicatedJobs"][0]["template"] if manifest["kind"] == "JobSet" else manifest
    return job["spec"]["template"]["spec"]


def expanded(arguments: list[str]) -> list[str]:
    """What Kubernetes makes of arguments: $$ is a dollar, $(NAME) a variable."""
    assert all("$(" not in argument.replace("$$", "") for argument in arguments)
    return [argument.replace("$$", "$") for argument in arguments]


def test_a_trainer_on_every_host_of_one_slice(cluster: StandIns) -> None:
    (trainer,) = submitted(cluster, *FLAGS, "--", *ODD)
    assert (trainer["apiVersion"], trainer["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert trainer["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    failure = trainer["spec"]["failurePolicy"]
    assert failure == {
        "maxRestarts": 100,
        "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    job = trainer["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["parallelism"], job["completions"], job["backoffLimit"]) == (
        "Indexed",
        4,
        4,
        0,
    )
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2]}}
    ]
    spec = pod(trainer)
    assert (spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = spec["containers"]
    assert container["image"] == FLAGS[1]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert expanded(container["args"]) == ODD
    assert spec["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/search-r3"}]


def test_settings_reach_their_places(cluster: StandIns) -> None:
    flags = (
        "--name own --bucket 12345 --mount /gcs --accelerator tpu-v5p-slice --topology 2x2x4 --spot "
        "--secret hf --account me"
    )
    more = "--namespace team --restarts 7 --grace 300 --image i"
    (trainer,) = submitted(cluster, *flags.split(), *more.split(), "--", "sft", "--run=/gcs/r")
    assert trainer["metadata"]["name"] == "own"
    assert trainer["metadata"]["namespace"] == "team"
    assert trainer["spec"]["failurePolicy"]["maxRestarts"] == 7
    job = trainer["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 4
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    spec = pod(trainer)
    assert (spec["serviceAccountName"], spec["terminationGracePeriodSeconds"]) == ("me", 300)
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert spec["tolerations"][0]["value"] == "true"
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "hf", "optional": False}}]
    (volume,) = spec["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "12345"
    assert "persistentVolumeClaim" not in volume


def test_the_indexer_is_a_job_of_its_own(cluster: StandIns) -> None:
    trainer, indexer = submitted(cluster, *FLAGS, "--indexers", "2", "--", "rl", "--run", "/mnt/search-r3/$x")
    assert expanded(pod(trainer)["containers"][0]["args"]) == [
        "rl",
        "--run",
        "/mnt/search-r3/$x",
        "--no-index.local",
    ]
    assert (indexer["apiVersion"], indexer["kind"], indexer["metadata"]["name"]) == (
        "batch/v1",
        "Job",
        "search-r3-indexer",
    )
    assert (
        indexer["spec"]["completionMode"],
        indexer["spec"]["completions"],
        indexer["spec"]["parallelism"],
    ) == ("Indexed", 2, 2)
    (container,) = pod(indexer)["containers"]
    assert container["command"] == ["search-r3", "indexer"]
    run = container["args"][1]
    assert container["args"] == ["--run", run, "--process", "$(JOB_COMPLETION_INDEX)", "--processes", "2"]
    assert pod(indexer)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod(indexer)["volumes"] == pod(trainer)["volumes"]
    # Neither twice nor for a trainer that has none.
    trainer, _ = submitted(
        cluster, *FLAGS, "--indexers=1", "--", "rl", "--no-index.local", "--run=/mnt/search-r3/r"
    )
    assert pod(trainer)["containers"][0]["args"].count("--no-index.local") == 1


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (["--image", "i"], ["sft"]),
        (["--image", "i", "--claim", "a", "--bucket", "b"], ["sft"]),
        (["--claim", "a"], ["sft"]),
        ([*FLAGS, "--topology", "4x4;id"], ["sft"]),
        ([*FLAGS, "--topology", "2x3"], ["sft"]),
        ([*FLAGS, "--chips", "0"], ["sft"]),
        ([*FLAGS, "--name", "Own_Name"], ["sft"]),
        ([*FLAGS, "--secret", 'a", x: "'], ["sft"]),
        ([*FLAGS, "--mount", 'x"'], ["sft"]),
        ([*FLAGS, "--indexers", "1"], ["rl"]),
        (FLAGS, ["sft", "--run", "/tmp/r"]),
        (FLAGS, []),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(
    cluster: StandIns, flags: list[str], arguments: list[str]
) -> None:
    done = cluster.run("gke/submit.sh", *flags, "--", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert cluster.calls("kubectl") == []


def test_what_a_dry_run_prints_is_what_kubectl_would_get(cluster: StandIns) -> None:
    dry = cluster.run("gke/submit.sh", *FLAGS, "--indexers", "1", "--dry-run", "--", *ODD)
    assert cluster.calls("kubectl") == []
    assert dry.stdout.splitlines()[0] == "# kubectl apply --filename=-"
    assert list(yaml.safe_load_all(dry.stdout)) == submitted(cluster, *FLAGS, "--indexers", "1", "--", *ODD)


def test_deleting(cluster: StandIns) -> None:
    wanted = [
        "delete",
        "--namespace=team",
        "--ignore-not-found",
        "jobsets.jobset.x-k8s.io/own",
        "job.batch/own-indexer",
    ]
    dry = cluster.run("gke/submit.sh", "--delete", "--name", "own", "--namespace", "team", "--dry-run")
    assert shown(dry.stdout) == [["kubectl", *wanted]]
    assert cluster.run("gke/submit.sh", "--delete", "--name", "own", "--namespace", "team").returncode == 0
    assert cluster.calls("kubectl") == [wanted]


def test_the_same_by_way_of_xpk(cluster: StandIns, tmp_path: Path) -> None:
    flags = [
        "--xpk",
        "--cluster",
        "c",
        "--project",
        "p",
        "--zone",
        "z",
        "--storage",
        "s",
        "--spot",
        "--image",
        "i",
    ]
    for accelerator, topology, kind in [
        ("tpu-v5-lite-podslice", "4x8", "v5litepod-32"),
        ("tpu-v6e-slice", "4x4", "v6e-16"),
        ("tpu-v5p-slice", "2x2x2", "v5p-16"),
        ("tpu-v4-podslice", "2x2x4", "v4-32"),
    ]:
        printed = cluster.run(
            "gke/submit.sh", *flags, "--accelerator", accelerator, "--topology", topology, "--", *ODD
        )
        assert printed.returncode == 0, printed.stderr
        (words,) = shown(printed.stdout)
        where = [
            "--workload=search-r3",
            "--cluster=c",
            "--project=p",
            "--zone=z",
            f"--tpu-type={kind}",
            "--docker-image=i",
            "--storage=s",
        ]
        assert words[:10] == ["xpk", "workload", "create", *where]
        assert words[10:13] == ["--spot", "--max-restarts=100", "--restart-on-exit-codes=1,3-126"]
        # xpk puts it into a shell script.
        command = words[-1].removeprefix("--command=")
        read = subprocess.run(
            ["bash", "-c", f"set -- {command}; printf '%s\\0' \"$@\""],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert read.stdout.decode().split("\0")[:-1] == ["exec", "search-r3", *ODD]
    assert cluster.calls("kubectl") == []
    assert cluster.run("gke/submit.sh", "--xpk", "--image", "i", "--", "sft").returncode == 2


@pytest.mark.parametrize(
    ("program", "signal", "status"),
    [
        ("echo hello; exit 0", False, 0),
        ("echo hello; exit 2", False, 2),
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
    (trainer,) = submitted(cluster, *FLAGS, "--", *ODD)
    (container,) = pod(trainer)["containers"]
    command = [
        part.replace("/tmp/output", str(tmp_path / "output"))
        for part in expanded([*container["command"], *container["args"]])
    ]
    cluster.program("search-r3", f"printf '%s\\0' \"$@\" >{tmp_path}/arguments\n{program}")
    process = subprocess.Popen(command, env=cluster.environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n"
    if signal:
        process.terminate()
    assert process.wait(timeout=30) == status
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == ODD
    assert (process.stdout.read() == SAVED + "\n") == (status == 75)


def test_a_template_with_a_value_that_is_missing_is_refused(cluster: StandIns) -> None:
    fill = [
        str(cluster.tools / "python3"),
        str(LAUNCH / "gke/fill.py"),
        str(LAUNCH / "gke/trainer.yaml"),
        "name=x",
        "--",
    ]
    done = subprocess.run(fill, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
