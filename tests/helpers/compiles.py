"""Counts the programs that JAX lowers, whether or not a compile cache then has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@contextmanager
def lowered_programs() -> Iterator[list[str]]:
    """The names of the programs that are lowered within the block, as they come."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **said: Any) -> None:
        if event == LOWERED:
            names.append(str(said["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
