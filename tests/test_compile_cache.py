"""What was compiled once is found again: by the next call, by one beside it, and by a run that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search_r3_jax.compile_cache import MOST_BYTES, keep_programs, user_folder

HEARD = """
import json, sys
from pathlib import Path
import jax
heard = {"hits": 0, "misses": 0}

def listen(name, **_):
    found = name.rsplit("cache_", 1)
    if found[0] == "/jax/compilation_cache/":
        heard[found[1]] = heard.get(found[1], 0) + 1

jax.monitoring.register_event_listener(listen)
"""
PROGRAM = f"""
{HEARD}
import jax.numpy as jnp
from search_r3_jax import compile_cache

x = jax.numpy.ones((8, 8)).block_until_ready()
how, folder = sys.argv[1], Path(sys.argv[2])
if how == "run":
    compile_cache.keep_programs()
    compile_cache.keep_programs_with_run(folder)
else:
    compile_cache.keep_programs(how == "keep")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
value = float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))(x))
print(json.dumps([value, heard["hits"] > 0, jax.config.jax_compilation_cache_max_size]))
"""


def environment_of(caches: Path, **others: str) -> dict[str, str]:
    """That of a user: not where the tests keep their programs."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    return inherited | {"XDG_CACHE_HOME": str(caches)} | others


def start(caches: Path, how: str = "keep", folder: Path = Path(), **others: str) -> list[object]:
    """The value of a small program, whether its code was found, and the bound of the folder."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, str(folder)],
        capture_output=True,
        text=True,
        env=environment_of(caches, **others),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache"))


@pytest.mark.slow
def test_a_program_is_made_once_and_found_by_the_next_call(tmp_path: Path) -> None:
    value, found, bound = start(tmp_path)
    assert (found, bound) == (False, MOST_BYTES)
    assert start(tmp_path) == [value, True, MOST_BYTES]
    (folder,) = (tmp_path / "search-r3").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    # Asked to keep nothing, nothing is read or written.
    before = programs(tmp_path)
    assert start(tmp_path, "forget")[:2] == [value, False]
    assert programs(tmp_path) == before
    # Who has named a folder for all programs keeps it, with its own bounds.
    other = tmp_path / "other"
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(other)) == [value, False, -1]
    assert programs(other)


@pytest.mark.slow
def test_a_program_that_was_half_written_is_made_anew(tmp_path: Path) -> None:
    value, *_ = start(tmp_path)
    for program in programs(tmp_path):
        program.write_bytes(program.read_bytes()[:100])
        program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    assert start(tmp_path)[:2] == [value, False]
    assert start(tmp_path)[:2] == [value, True]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    value, found, _ = start(tmp_path / "file")
    assert not found
    assert start(tmp_path)[0] == value


@pytest.mark.slow
def test_processes_beside_each_other_share_the_folder(tmp_path: Path) -> None:
    beside = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "keep", ""],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of(tmp_path),
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in beside]
    assert [process.returncode for process in beside] == [0, 0, 0]
    assert {err for _, err in said} == {""}
    assert len({json.loads(out)[0] for out, _ in said}) == 1
    assert start(tmp_path)[1]


def test_a_run_keeps_its_programs_itself(tmp_path: Path) -> None:
    """A machine that takes over has another user's folder, or none."""
    run = tmp_path / "run" / "compiled"
    value, found, _ = start(tmp_path / "a", "run", run)
    assert not found
    assert programs(run)
    assert start(tmp_path / "b", "run", run) == [value, True, -1]


def test_the_folder_names_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = user_folder()
    assert here is not None
    assert here.parent == tmp_path / "search-r3"
    monkeypatch.setattr("search_r3_jax.compile_cache._instructions", lambda: "others")
    assert user_folder() != here


def test_who_has_no_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    assert user_folder() is None
    keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "reason"])
def test_the_second_call_of_a_command_compiles_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    (tmp_path / "texts.txt").write_text("a cat\na much longer text about a dog and its many friends\n")
    arguments = ["embed", "--model", str(tiny_folders["qwen3"]), "--input", str(tmp_path / "texts.txt")]
    program = f"""
{HEARD}
sys.argv[1:] = {[*arguments, "--mode", mode, "--out"]!r} + [sys.argv[1]]
from search_r3_jax.cli import main
main()
print(json.dumps(heard))
"""
    made, found = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / out)],
                capture_output=True,
                text=True,
                env=environment_of(tmp_path),
                timeout=300,
                check=True,
            ).stdout.splitlines()[-1]
        )
        for out in ("first.npy", "second.npy")
    )
    assert made["misses"] > 0
    assert found["misses"] == 0
    assert found["hits"] > 0
    assert (tmp_path / "first.npy").read_bytes() == (tmp_path / "second.npy").read_bytes()
