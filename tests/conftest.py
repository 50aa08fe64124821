"""Shared by all tests: quiet libraries, CPU, tiny models of every family."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_r3_jax.runtime_env import configure_libraries

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs of tests run for a moment, and are compiled for seconds: what makes code fast is left out,
# here and in what tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
configure_libraries()


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
