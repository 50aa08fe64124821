"""Traces of chosen steps for xprof, and the names of steps and their parts in a trace."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from search_r3_jax.errors import UserError

FLAG = "--profile-steps"
TRAIN, ENCODE = "train", "encode"
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Trace:
    """The trace that is asked for.

    Attributes:
        name: of the steps that are counted.
        seen: number of these steps so far.
        state: "waiting" for its first step, "running", or "ended".
    """

    name: str
    steps: range
    folder: Path
    say: Callable[[str], object]
    seen: int = 0
    state: str = "waiting"

    def start(self) -> None:
        """Begin to record devices and named parts; Python calls would hide them."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
        except (OSError, RuntimeError) as error:
            self.give_up(error)
            return
        self.state = "running"

    def stop(self) -> None:
        """Write what was recorded."""
        self.state = "ended"
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self.give_up(error)
            return
        self.say(f"profile: xprof --logdir {self.folder} shows the trace")

    def give_up(self, error: Exception) -> None:
        """Say why there is no trace; the work goes on without."""
        self.state = "ended"
        logger.warning(f"profile: {self.folder}: cannot be written ({' '.join(str(error).split())[:200]})")


_asked: list[_Trace] = []


def parse_steps(text: str | None, *, total: int | None = None, of: str = "") -> range | None:
    """The steps that FIRST:END names: FIRST and those up to END, which is not one of them.

    Raises UserError for anything else, and for an END beyond `total`, which is the number of `of`; None is
    None.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if found is None:
        raise UserError(f"{FLAG}: {text}: give FIRST:END, such as 3:6 for the steps 3, 4 and 5")
    steps = range(int(found[1]), int(found[2]))
    if not steps:
        raise UserError(f"{FLAG}: {text}: holds no step; give an END above FIRST, such as 3:6")
    if total is not None and steps.stop > total:
        raise UserError(f"{FLAG}: {text}: there are {total} {of}; give an END of at most {total}")
    return steps


@contextlib.contextmanager
def trace_steps(
    name: str, steps: range | None, folder: Path, *, say: Callable[[str], object] = logger.info
) -> Iterator[None]:
    """While open, trace these steps of this name, and write that to a folder; None traces nothing.

    Of several processes the first one is traced. `say` gets a line when the trace is written.
    """
    if steps is None:
        yield
        return
    trace = _Trace(name=name, steps=steps, folder=folder, say=say)
    if jax.process_index() == 0:
        _asked.append(trace)
    try:
        yield
        if trace in _asked and trace.state == "waiting":
            asked = f"{steps.start}:{steps.stop}"
            logger.warning(f"profile: {trace.seen} steps were run, none of {asked}: nothing is traced")
    finally:
        if trace in _asked:
            _asked.remove(trace)
            if trace.state == "running":
                # The work ended, or was ended, within the range.
                trace.stop()


def trace_run(steps: range | None, run_folder: Path) -> contextlib.AbstractContextManager[None]:
    """While open, trace these steps of a training run into its folder `profile/`."""
    return trace_steps(TRAIN, steps, run_folder / "profile")


@contextlib.contextmanager
def step(name: str, number: int | None = None) -> Iterator[bool]:
    """One step of the work, by this name in a trace; without a number it is counted.

    Yields whether a trace ends with this step: then wait within it for what devices still compute.
    """
    trace = next((each for each in _asked if each.name == name), None)
    if trace is None:
        with jax.profiler.StepTraceAnnotation(name, step_num=number or 0):
            yield False
        return
    number = trace.seen if number is None else number
    trace.seen += 1
    if trace.state == "waiting" and number in trace.steps:
        trace.start()
    last = trace.state == "running" and number == trace.steps[-1]
    with jax.profiler.StepTraceAnnotation(name, step_num=number):
        yield last
    if last:
        trace.stop()


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """A part of a step, by this name in a trace."""
    return jax.profiler.TraceAnnotation(name)
