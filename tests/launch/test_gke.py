"""`gke/submit.sh` fills in manifests that Kubernetes reads as they were meant; a stopped run does not pass
for a finished one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.fake_cloud_tools import LAUNCH, StandIns, shown

from search_r3_jax.cli import parse

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
    assert "command" not in container
    assert container["env"] == [
        {"name": "SEARCH_R3_PAUSE", "value": "10"},
        {
            "name": "SEARCH_R3_ATTEMPT",
            "valueFrom": {
                "fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}
            },
        },
    ]
    assert spec["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/search-r3"}]


def test_settings_reach_their_places(cluster: StandIns) -> None:
    flags = (
        "--name own --bucket 12345 --mount /gcs --accelerator tpu-v5p-slice --topology 2x2x4 --spot "
        "--secret hf --account me"
    )
    more = "--namespace team --restarts 7 --pause 0 --grace 300 --image i --node-pool np"
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
        "cloud.google.com/gke-nodepool": "np",
    }
    assert spec["containers"][0]["env"][0] == {"name": "SEARCH_R3_PAUSE", "value": "0"}
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
        "--index.no-local",
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
    asked = ["indexer", "--run", "/mnt/search-r3/$x", "--process", "$(JOB_COMPLETION_INDEX)"]
    assert container["args"] == [*asked, "--processes", "2"]
    assert "command" not in container
    assert pod(indexer)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod(indexer)["volumes"] == pod(trainer)["volumes"]
    # A mistake ends it; a process that ended is replaced by itself, one whose machine is gone for nothing.
    assert indexer["spec"]["backoffLimit"] == 200
    assert pod(indexer)["restartPolicy"] == "Never"
    assert indexer["spec"]["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "indexer", "operator": "In", "values": [2]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    # Neither twice nor for a trainer that has none.
    trainer, _ = submitted(
        cluster, *FLAGS, "--indexers=1", "--", "rl", "--index.no-local", "--run=/mnt/search-r3/r"
    )
    assert pod(trainer)["containers"][0]["args"].count("--index.no-local") == 1


@pytest.mark.parametrize(
    ("flags", "topology", "chips", "bounds", "processes"),
    [
        ("--indexers 2", "2x2", 4, "2,2,1", 2),
        ("--indexers 1 --indexer-topology 4x4 --indexer-pool own", "4x4", 4, "2,2,1", 4),
        ("--indexers 3 --indexer-topology 4x8", "4x8", 4, "2,2,1", 24),
        ("--indexers 1 --indexer-topology 2x4 --indexer-chips 8", "2x4", 8, "2,4,1", 1),
        ("--indexers 1 --indexer-topology 1x1", "1x1", 1, "1,1,1", 1),
        ("--indexers 2 --accelerator tpu-v5p-slice", "2x2x1", 4, "2,2,1", 2),
        ("--indexers 1 --indexer-accelerator tpu-v5p-slice --indexer-topology 2x2x4", "2x2x4", 4, "2,2,1", 4),
    ],
)
def test_each_host_of_the_indexers_slices_is_a_process(
    cluster: StandIns, flags: str, topology: str, chips: int, bounds: str, processes: int
) -> None:
    _, indexer = submitted(cluster, *FLAGS, *flags.split(), "--", "rl", "--run", "/mnt/search-r3/r")
    spec = indexer["spec"]
    assert (spec["parallelism"], spec["completions"]) == (processes, processes)
    selector = pod(indexer)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    deep = "x1" in topology[2:] or topology.count("x") == 2
    assert (selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice") == deep
    assert selector.get("cloud.google.com/gke-nodepool") == ("own" if "own" in flags else None)
    (container,) = pod(indexer)["containers"]
    assert container["args"][-1] == str(processes)
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["env"] == [{"name": "SEARCH_R3_BOUNDS", "value": bounds}]


def test_several_slices_are_one_jobset_with_a_mesh_over_them(cluster: StandIns) -> None:
    (trainer,) = submitted(cluster, *FLAGS, "--slices", "3", "--", "sft", "--run", "/mnt/search-r3/r")
    (job,) = trainer["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (3, 4)
    assert pod(trainer)["containers"][0]["args"] == ["sft", "--run", "/mnt/search-r3/r", "--mesh.slice", "3"]
    (trainer,) = submitted(cluster, *FLAGS, "--accelerator", "tpu-v5p-slice", "--", "sft")
    (job,) = trainer["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (1, 2)
    assert pod(trainer)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"


def test_the_flag_that_is_added_is_one_of_search_r3() -> None:
    added = parse(
        ["rl", "--config", "smollm2", "--run", "r", "--index.no-local", "--mesh.slice", "3"]
    ).settings
    assert (added.index.local, added.mesh.slice) == (False, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--indexers 1 --indexer-topology 2x2x1",
            "--indexer-topology: '2x2x1': slices of tpu-v5-lite-podslice",
        ),
        (
            "--accelerator tpu-v5p-slice --topology 2x2",
            "--topology: '2x2': slices of tpu-v5p-slice have three sizes",
        ),
        (
            "--indexers 1 --indexer-topology 4x4",
            "--indexer-topology: 4x4 is the trainer's, too; --indexer-pool",
        ),
        ("--indexers 1 --indexer-topology 2x4 --indexer-chips 3", "--indexer-topology: 2x4 has 8 chips"),
        ("--indexers 1 --indexer-topology 2x4 --indexer-chips 2", "--indexer-chips: 2: hosts have 1, 4 or 8"),
        ("--slices 2 --topology 2x4 --chips 8", "--slices: GKE joins slices of several hosts only"),
        ("--slices 2 --node-pool p", "--node-pool: a node pool is one slice"),
        ("--slices 0", "--slices: at least 1"),
        (
            "--slices 2 -- rl --mesh.slice 4 --run /mnt/search-r3/r",
            "--mesh.slice: 4: it has to be the number of",
        ),
        (
            "--indexers 1 -- rl --index.local --run /mnt/search-r3/r",
            "--index.local: --indexers starts the indexer",
        ),
    ],
)
def test_slices_that_there_are_not_are_refused(cluster: StandIns, flags: str, message: str) -> None:
    words = (
        flags.split() if "--" in flags.split() else [*flags.split(), "--", "rl", "--run", "/mnt/search-r3/r"]
    )
    done = cluster.run("gke/submit.sh", *FLAGS, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"submit.sh: {message}")
    assert cluster.calls("kubectl") == []


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
            "--num-slices=1",
            "--docker-image=i",
            "--storage=s",
        ]
        assert words[:11] == ["xpk", "workload", "create", *where]
        assert words[11:14] == ["--spot", "--max-restarts=100", "--restart-on-exit-codes=1,3-126"]
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
