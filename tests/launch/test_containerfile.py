"""The image of `launch/Containerfile`, without an engine: what it copies is in git and reaches the build,
nothing else does, and its entry point runs from the copied files alone."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.fake_cloud_tools import LAUNCH, StandIns

ROOT = LAUNCH.parent
FILE = LAUNCH / "Containerfile"
IGNORED = LAUNCH / "Containerfile.dockerignore"


class Instruction(NamedTuple):
    """One of the file, with what stands behind its name."""

    name: str
    words: list[str]


def instructions() -> list[Instruction]:
    text = "\n".join(line for line in FILE.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = []
    for line in filter(None, lines):
        name, rest = line.split(None, 1)
        found.append(Instruction(name, json.loads(rest) if rest.startswith("[") else rest.split()))
    return found


def tracked() -> list[str]:
    """The files of the sources: those of git, or of a source archive, which holds nothing else."""
    if not (ROOT / ".git").exists():
        return [str(file.relative_to(ROOT)) for file in ROOT.rglob("*") if file.is_file()]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.splitlines()


def copies() -> dict[str, str]:
    """Each source of the image, and where it goes below /opt/search_r3_jax."""
    places = {}
    for name, words in instructions():
        if name == "COPY":
            *sources, target = words
            for source in sources:
                into = target.endswith("/") and (ROOT / source).is_file()
                places[source] = os.path.normpath(f"{target}/{Path(source).name}" if into else target)
    return places


def files_of(source: str) -> list[str]:
    return [name for name in tracked() if name == source or name.startswith(f"{source}/")]


def is_left_out(name: str) -> bool:
    """Whether the ignore file keeps a path from the build: the last pattern counts that fits it or a folder
    above."""
    left_out = False
    paths = [name, *(str(folder) for folder in Path(name).parents if str(folder) != ".")]
    for line in IGNORED.read_text().splitlines():
        if line.startswith("#") or not line:
            continue
        pattern = line.removeprefix("!")
        anywhere = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(Path(path).name if pattern != anywhere else path, anywhere)
            and (pattern != anywhere or path.count("/") == anywhere.count("/"))
            for path in paths
        ):
            left_out = not line.startswith("!")
    return left_out


def test_what_is_copied_is_in_the_sources_and_reaches_the_build() -> None:
    assert set(copies()) >= {"setup.cfg", "pyproject.toml", "requirements.txt", "search_r3_jax"}
    for source in copies():
        files = files_of(source)
        assert files, f"{source}: not in the sources"
        assert [name for name in files if is_left_out(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "secrets.env",
        "search_r3_jax/own.env",
        ".git/config",
        ".venv/bin/python",
        "runs/sft/checkpoints/0/params",
        "tests/conftest.py",
        "launch/plans.sh",
        "search_r3_jax/__pycache__/cli.cpython-312.pyc",
        "search_r3_jax/data/__pycache__/x.pyc",
    ],
)
def test_nothing_else_reaches_the_build(name: str) -> None:
    assert is_left_out(name)


def test_the_install_finds_all_that_it_names() -> None:
    (install,) = [words for name, words in instructions() if name == "RUN"]
    before = [name for name, _ in instructions()]
    assert before.index("COPY") < before.index("RUN")
    assert install[:4] == ["python", "-m", "pip", "install"]
    assert install[install.index("--constraint") + 1] in copies()
    assert install[-1] == '".[tpu]"'
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    assert "tpu" in package["options.extras_require"]
    # What the description of the package reads.
    named = {
        package["metadata"]["license_files"],
        package["metadata"]["long_description"].removeprefix("file: "),
    }
    assert named <= set(copies())
    # The image's Python is one that the package takes, and that its tests know.
    python = next(words[0] for name, words in instructions() if name == "ARG").removeprefix("PYTHON=")
    assert f"Programming Language :: Python :: {python}" in package["metadata"]["classifiers"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies below /opt/search_r3_jax before the install."""
    root = tmp_path_factory.mktemp("image") / "search_r3_jax"
    for source, place in copies().items():
        for name in files_of(source):
            target = root / place / os.path.relpath(name, source) if name != source else root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return root


def entry_point(image: Path) -> Path:
    (command,) = next(words for name, words in instructions() if name == "ENTRYPOINT")
    return image / os.path.relpath(command, "/opt/search_r3_jax")


def test_the_entry_point_runs_from_the_copied_files(image: Path, tmp_path: Path) -> None:
    assert os.access(entry_point(image), os.X_OK)
    container = StandIns(tmp_path)
    # What the install makes of the copied files.
    program = (
        f'PYTHONPATH="{image}" exec {sys.executable} -c "from search_r3_jax.cli import main; main()" "$@"'
    )
    container.program("search-r3", program)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return container.run_file(entry_point(image), *words)

    version = run("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert re.fullmatch(r"search-r3 \d\S*\n", version.stdout)
    mistake = run("sft", "--config", "nope", "--run", "r")
    assert mistake.returncode == 2
    assert "--config: nope: no such experiment; there are quickstart," in mistake.stdout
    assert mistake.stdout.endswith("is to be mended, and is not tried again\n")
    # Of this checkout nothing was read.
    assert str(ROOT) not in mistake.stdout


def test_the_install_makes_the_program_that_the_entry_point_starts(image: Path) -> None:
    package = configparser.ConfigParser()
    package.read(image / "setup.cfg")
    assert "search-r3 = search_r3_jax.cli:main" in package["options.entry_points"]["console_scripts"]
    assert re.search(r"^\s+exec search-r3 ", entry_point(image).read_text(), re.MULTILINE)
