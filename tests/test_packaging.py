"""What is handed out: a whole source archive, a wheel with the package alone, completion of the shell."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers.command_line import search_r3_here

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel, built from a copy, as building leaves files in the sources."""
    copy, out = tmp_path_factory.mktemp("copy") / "search_r3_jax", tmp_path_factory.mktemp("out")
    left_out = (".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache", "build", "dist")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    for build in ("build_sdist", "build_wheel"):
        command = [sys.executable, "-c", PROGRAM, build, str(out)]
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_source_archive_holds_the_launchers_and_the_pages(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "launch").rglob("*") if file.is_file()}
    assert wanted - {name for name in wanted if "__pycache__" in name} <= names.keys()
    pages = {
        str(page.relative_to(ROOT))
        for room in ("search_r3_jax", "tests")
        for page in (ROOT / room).rglob("*.md")
    }
    assert (
        pages
        | {
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "LICENSE",
            "requirements.txt",
            "requirements-py311.txt",
        }
        <= names.keys()
    )
    assert names["launch/quickstart.sh"].mode & 0o100
    assert not any(name.endswith(".pyc") for name in names)


def test_the_wheel_is_the_package_alone(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
        metadata = Parser().parsestr(
            wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
        )
    assert {name.split("/")[0].split("-")[0] for name in names} == {"search_r3_jax"}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "search_r3_jax").rglob("*.py")}
    assert modules | {"search_r3_jax/py.typed"} <= set(names)
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"quickstart", "eval", "mteb", "plan", "datasets", "test", "tpu", "cuda"} <= extras
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2510.07048"]
    # As the README installs it.
    assert f"{archives[1].name}[quickstart]" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_of_the_shell(tmp_path: Path, shell: str) -> None:
    shown = search_r3_here("--tyro-print-completion", shell)
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in ("quickstart", "data", "sft", "export", "--data.sets", "--sft.global-batch"):
        assert word in shown.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "completion"
    script.write_text(shown.stdout)
    subprocess.run([shell, "-n", script], check=True)
    if shell == "bash":
        loaded = subprocess.run(
            ["bash", "-c", f'. "{script}"; complete -p search-r3'], check=True, capture_output=True, text=True
        )
        assert "search" in loaded.stdout
