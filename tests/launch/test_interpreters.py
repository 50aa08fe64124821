"""Which pinned set an interpreter gets, and which interpreter is one of the other line of JAX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_cloud_tools import LAUNCH

BASH = shutil.which("bash") or "bash"


def python(file: Path, version: tuple[int, int]) -> Path:
    """An interpreter that says that it has this version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    program = f"import sys; sys.version_info = ({version[0]}, {version[1]}, 1); exec(sys.argv[1])"
    file.write_text(f"#!{BASH}\nexec {sys.executable} -S -c '{program}' \"$2\"\n")
    file.chmod(0o755)
    return file


def said(tmp_path: Path, call: str, **variables: str) -> str:
    """What a function of `environment.sh` prints, with nothing in the path but `bin`."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **variables}
    command = [BASH, "-euo", "pipefail", "-c", f". {LAUNCH}/environment.sh; {call}"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("minor", "pinned"), [(11, "requirements-py311.txt"), (12, "requirements.txt"), (13, "requirements.txt")]
)
def test_the_pinned_set_is_that_of_the_interpreter(tmp_path: Path, minor: int, pinned: str) -> None:
    own = python(tmp_path / "bin/python", (3, minor))
    assert said(tmp_path, f"requirements_of {own}") == pinned
    assert (LAUNCH.parent / pinned).is_file()


def test_an_interpreter_of_the_other_line_is_found(tmp_path: Path) -> None:
    python(tmp_path / "bin/python", (3, 11))
    assert said(tmp_path, "other_python") == ""
    # A shim without its version, and one in pyenv that is of the same line.
    shim = tmp_path / "bin/python3.12"
    shim.write_text(f"#!{BASH}\nexit 127\n")
    shim.chmod(0o755)
    python(tmp_path / "home/.pyenv/versions/3.11.9/bin/python3.11", (3, 11))
    assert said(tmp_path, "other_python") == ""
    found = python(tmp_path / "home/.pyenv/versions/3.13.0/bin/python3.13", (3, 13))
    assert said(tmp_path, "other_python") == str(found)
    elsewhere = python(tmp_path / "pyenv/versions/3.12.1/bin/python3.12", (3, 12))
    assert said(tmp_path, "other_python", PYENV_ROOT=str(tmp_path / "pyenv")) == str(elsewhere)
    named = python(tmp_path / "named", (3, 12))
    assert said(tmp_path, "other_python", OTHER_PYTHON=str(named)) == str(named)
    # The line of before, for an environment of the current one.
    python(tmp_path / "bin/python", (3, 13))
    assert said(tmp_path, "other_python") == os.fspath(
        tmp_path / "home/.pyenv/versions/3.11.9/bin/python3.11"
    )
    # Older than any line.
    python(tmp_path / "old", (3, 10))
    assert said(tmp_path, "other_python", OTHER_PYTHON=str(tmp_path / "old"), PYENV_ROOT="/nowhere") == ""
