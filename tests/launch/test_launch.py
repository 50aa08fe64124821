"""What all launchers have in common: their syntax, one line for a mistake, nothing started in a dry run, no
secret ever shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.command_line import search_r3_here
from helpers.fake_cloud_tools import LAUNCH, StandIns

SCRIPTS = sorted(str(file.relative_to(LAUNCH)) for file in LAUNCH.rglob("*.sh"))
# How each is called, and the tools of a cloud without which it cannot go on.
CALLS = {
    "tpu_vm.sh": (["up", "--poll", "0", "--", "sft"], ["gcloud"]),
    "gke/submit.sh": (["--image", "i", "--claim", "c", "--", "sft"], ["kubectl"]),
    "slurm.sh": (["--", "sft"], ["sbatch"]),
    "local.sh": (["--", "sft"], ["search-r3"]),
}
TOKEN = "hf_TopSecretTopSecretTopSecretTop"


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    standins = StandIns(tmp_path)
    for _, tools in CALLS.values():
        for tool in tools:
            standins.add(tool)
    return standins


def calls(cloud: StandIns) -> list[list[str]]:
    return [call for _, tools in CALLS.values() for tool in tools for call in cloud.calls(tool)]


def with_arguments(words: list[str], *more: str) -> list[str]:
    """The call with flags before the dashes."""
    at = words.index("--")
    return [*words[:at], *more, *words[at:]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    head = (LAUNCH / script).read_text()
    # Of the two that are sourced the caller says how.
    assert script in ("common.sh", "environment.sh") or "\nset -euo pipefail\n" in head
    assert os.access(LAUNCH / script, os.X_OK) == (script not in ("common.sh", "environment.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    done = subprocess.run(
        ["shellcheck", "-x", "-P", LAUNCH.parent, LAUNCH / script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", CALLS)
def test_help_names_every_flag(cloud: StandIns, script: str) -> None:
    done = cloud.run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    known = (
        (LAUNCH / script).read_text().split("while [ $# -gt 0 ]")[1].split('case "$1" in')[1].split("esac")[0]
    )
    flags = {
        word.rstrip("=*").strip()
        for line in known.replace("\\\n", " ").splitlines()
        if ")" in line
        for word in line.split(")")[0].split("|")
        if "--" in word
    }
    assert flags
    assert all(flag in done.stdout for flag in flags - {"--", "--help", "--*"}), flags


@pytest.mark.parametrize("script", CALLS)
def test_a_mistake_is_one_line_and_starts_nothing(cloud: StandIns, script: str) -> None:
    words, _ = CALLS[script]
    for wrong in (
        with_arguments(words, "--bogus"),
        with_arguments(words, "bogus"),
        [*words, "two\nlines"],
        [*words, "two\rlines"],
        [*words, TOKEN],
        [*words, f"--key={TOKEN}"],
        [*words, "https://me:secret@example.org/x"],
        words[: words.index("--")],
        words[: words.index("--") + 1],
    ):
        done = cloud.run(script, *wrong)
        assert (done.returncode, done.stdout) == (2, ""), (wrong, done.stdout)
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{Path(script).name}: ")
        assert TOKEN not in done.stderr
        assert "secret" not in done.stderr
    flag = cloud.run(
        script,
        *(["up"] if script == "tpu_vm.sh" else []),
        {"local.sh": "--devices", "slurm.sh": "--nodes"}.get(script, "--name"),
    )
    assert (flag.returncode, flag.stderr.count("\n")) == (2, 1)
    assert calls(cloud) == []


@pytest.mark.parametrize("script", CALLS)
def test_a_tool_that_is_missing_is_named(cloud: StandIns, tmp_path: Path, script: str) -> None:
    words, tools = CALLS[script]
    # A checkout without an environment beside it, where search-r3 would be found.
    launch = Path(shutil.copytree(LAUNCH, tmp_path / "checkout" / "launch"))
    for tool in tools:
        (cloud.tools / tool).unlink()
    done = cloud.run_file(launch / script, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{tools[0]}: not found" in done.stderr


@pytest.mark.parametrize("script", CALLS)
def test_a_dry_run_calls_nothing_and_leaves_nothing(cloud: StandIns, script: str) -> None:
    words, tools = CALLS[script]
    before = sorted(cloud.folder.rglob("*"))
    done = cloud.run(script, *with_arguments(words, "--dry-run"), HF_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert any(tool in done.stdout for tool in tools)
    assert calls(cloud) == []
    assert sorted(cloud.folder.rglob("*")) == before
    assert TOKEN not in done.stdout


def test_an_environment_file_is_taken_as_it_stands(cloud: StandIns, tmp_path: Path) -> None:
    file = tmp_path / "own.env"
    read = f'. {LAUNCH}/common.sh; dry_run=; read_environment {file}; printf "%s|" "$A" "$HF_TOKEN"'

    def reading() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", read],
            env=cloud.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    file.write_text(f"# a comment\n\nA=$(touch hacked) `id` 'x' = \"y\nHF_TOKEN={TOKEN}")
    assert reading().stdout == f"$(touch hacked) `id` 'x' = \"y|{TOKEN}|"
    assert not (tmp_path / "hacked").exists()
    file.write_text(f"A=1\n{TOKEN}\n")
    bad = reading()
    assert bad.returncode == 2
    assert "line 2: not NAME=VALUE" in bad.stderr
    assert TOKEN not in bad.stderr


@pytest.mark.parametrize("script", CALLS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stf"], "stf: search-r3 has no such command"),
        (["sft", "--config", "nope"], "--config: nope: no such experiment; there are quickstart,"),
        (["sft", "--config=../x"], "--config: ../x: no such experiment"),
        (["sft", "--sft.gloabl-batch", "8"], "--sft.gloabl-batch: search-r3 sft has no such option;"),
        (["rl", "--index.no-lokal"], "--index.no-lokal: search-r3 rl has no such option"),
        # Of another section, and of no section.
        (["rl", "--sft.micro-queries", "8"], "--sft.micro-queries: search-r3 rl has no such option"),
        (["rl", "--rl.sampler.top", "1"], "--rl.sampler.top: search-r3 rl has no such option"),
        (["rl", "--rl.top-p=0.9"], "--rl.top-p: search-r3 rl has no such option"),
        (["rl", "--micro-queries", "8"], "--micro-queries: search-r3 rl has no such option"),
        (["rl", "--no-index.local"], "--no-index.local: search-r3 rl has no such option"),
        (["sft", "--.*", "8"], "--.*: search-r3 sft has no such option"),
    ],
)
def test_what_search_r3_does_not_know_is_refused_before_anything_starts(
    cloud: StandIns, script: str, arguments: list[str], message: str
) -> None:
    words, _ = CALLS[script]
    done = cloud.run(script, *words[: words.index("--") + 1], *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{Path(script).name}: {message}")
    assert calls(cloud) == []


@pytest.mark.parametrize(
    "command",
    ["quickstart", "data build", "data mine", "sft", "rl", "indexer", "eval", "mteb", "export", "plan"],
)
def test_every_option_that_there_is_passes(cloud: StandIns, command: str) -> None:
    shown = search_r3_here(
        *command.split(), *(["--config", "smollm2"] * (command in ("sft", "rl"))), "--help"
    )
    options = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", shown.stdout)) - {"--config"})
    assert len(options) > 3
    check = f'. {LAUNCH}/common.sh; check_search_r3 "$@"'
    done = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            check,
            "check",
            *command.split(),
            *options,
            "--rl.floor-gap",
            "0.1",
            "--index.when_old=wait",
        ],
        env=cloud.environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_installs_nothing(cloud: StandIns, script: str) -> None:
    (cloud.tools / "python3").unlink()
    before = sorted(LAUNCH.parent.iterdir())
    for flag in ("--help", "-h"):
        done = cloud.run(script, flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"launch/{script} [ARGUMENTS OF ")
        assert ".venv" in done.stdout
    if script == "quickstart.sh":
        done = cloud.run(script, "--uot", "folder")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("quickstart.sh: --uot: search-r3 quickstart has no such option")
    assert sorted(LAUNCH.parent.iterdir()) == before
