"""What the compiler is told, and that what it made is found again."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from search_r3_jax.chips import CHIPS
from search_r3_jax.compiler import compiler_options
from search_r3_jax.mesh import make_mesh

PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from search_r3_jax.compiler import keep_programs

keep_programs(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
heard = []
jax.monitoring.register_event_listener(lambda name, **_: heard.append(name))
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))(jnp.ones((8, 8)))))
print("found" if "/jax/compilation_cache/cache_hits" in heard else "made")
"""


def start(folder: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        capture_output=True,
        text=True,
        # Not where the tests keep their programs.
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_program_is_made_once_and_found_by_the_next_start(tmp_path: Path) -> None:
    folder, other = tmp_path / "compiled", tmp_path / "other"
    value, how = start(folder)
    assert how == "made"
    assert start(folder) == [value, "found"]
    # Who has named a folder for all programs keeps it.
    assert start(folder, JAX_COMPILATION_CACHE_DIR=str(other)) == [value, "made"]
    assert any(other.iterdir())


def test_a_cpu_is_told_nothing() -> None:
    assert compiler_options(None) == compiler_options(make_mesh(devices=jax.devices()[:1])) == {}


def test_every_generation_has_its_options() -> None:
    from search_r3_jax.compiler import _OF_CHIP

    assert _OF_CHIP.keys() == CHIPS.keys()
