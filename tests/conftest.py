"""Shared by all tests: quiet libraries, CPU, tiny models of every family."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_r3_jax.runtime_env import configure_libraries

# Until everything is imported; see `pytest_collection_finish`.
gc.disable()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs of tests run for a moment, and are compiled for seconds: what makes code fast is left out,
# here and in what tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's older emitters for CPU compile a training step in a third of the time. The line of JAX for Python 3.11
# is the last that has them; a process ends at a flag that it does not know.
if sys.version_info < (3, 12):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Torch works on tiny tensors here: more threads would wait for each other, at the expense of other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A program is compiled once a session: its workers, who inherit this, and the processes that they start find
# what one of them made.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="search-r3-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# What tests start needs no torch, and begins two seconds earlier without it.
if "PYTEST_XDIST_WORKER" in os.environ:
    without_torch = str(Path(__file__).parent / "helpers" / "without_torch")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [without_torch, os.environ.get("PYTHONPATH")]))
configure_libraries()

# Of two workers neither should begin the longest tests last.
LONGEST = (
    "training/test_rl_processes.py",
    "training/test_survival.py",
    "training/test_planted.py",
    "training/test_rl_sharding.py",
    "training/test_sharding.py",
    "training/test_restore_elsewhere.py",
    "training/test_stopping.py",
    "training/test_rl.py",
    "planning/test_committed.py",
    "planning/test_plan.py",
    "retrieval/indexer/test_faults.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with long tests first; within a module, and among the others, everything stays as it was."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks) + (item.path not in slow)))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which runs often here, need not go through it."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """For a module whose programs run for long, or are looked at themselves: they are compiled as anywhere
    else."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the package logs during the test."""
    from helpers.log_lines import collect_log_lines

    with collect_log_lines() as lines:
        yield lines


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder with tiny random weights for each family."""
    from helpers.tiny_models import write_tiny_checkpoint

    root = tmp_path_factory.mktemp("tiny")
    return {family: write_tiny_checkpoint(root / family, family) for family in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="session")
def tiny_model(tiny_folders: dict[str, Path]):
    """The tiny Llama, loaded."""
    from search_r3_jax.hub.load_model import load_model

    return load_model(tiny_folders["llama"])


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2-135M-Instruct with its real weights."""
    from search_r3_jax.hub.load_model import load_model

    return load_model("smollm2")
