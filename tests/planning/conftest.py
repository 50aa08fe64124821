"""Plans are of programs as they will run, with every optimisation."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _optimised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
