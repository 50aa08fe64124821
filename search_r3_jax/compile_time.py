"""Seconds that this process has spent compiling, and the lines that tell a person who waits for it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
logger = logging.getLogger(__name__)


class _Compiling:
    """The union of the times in which JAX traced, lowered or compiled."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []

    def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in EVENTS:
            self.add(time.perf_counter() - duration_secs, duration_secs)

    def add(self, start: float, seconds: float) -> None:
        # A function that is traced within another has been told of already: its time is part of the other's.
        while self._spans and self._spans[-1][0] >= start:
            self.seconds -= self._spans.pop()[1]
        self._spans.append((start, seconds))
        self.seconds += seconds


@functools.cache
def _compiling() -> _Compiling:
    compiling = _Compiling()
    jax.monitoring.register_event_duration_secs_listener(compiling.listen)
    return compiling


def compile_seconds() -> float:
    """Seconds of compiling since this was first called, programs of the compile cache included."""
    return _compiling().seconds


@contextmanager
def announce_compiling(what: str, *, when: bool = True) -> Iterator[None]:
    """Log that `what` compiles, and at the end the seconds that it did; nothing unless `when`."""
    if not when:
        yield
        return
    before = compile_seconds()
    logger.info(f"compiling {what} …")
    yield
    logger.info(f"compiled {what} in {compile_seconds() - before:.1f} s")
