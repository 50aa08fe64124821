"""The time that a stage still takes: steps at their recent pace, and the evaluations and saves to come."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.pace import RECENT, typical

Aside = Literal["evaluation", "save", "wait"]
# Evaluations and saves whose mean is expected of the next one.
FEW = 3


class TimeLeft:
    """Expects of the steps to come what recent ones took.

    A step is the time between two calls of `step_ended`, without compiling and without what was `aside`:
    evaluating, saving, waiting for an index.
    """

    def __init__(
        self,
        total: int,
        *,
        eval_every: int = 0,
        save_every: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        compiling: Callable[[], float] = compile_seconds,
    ):
        """Of a stage of `total` steps; 0 stands for no evaluations, or for saves after evaluations only."""
        self._total, self._eval_every, self._save_every = total, eval_every, save_every
        self._clock, self._compiling = clock, compiling
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._taken = 0
        self._asides: dict[Aside, deque[float]] = {
            kind: deque(maxlen=FEW) for kind in ("evaluation", "save", "wait")
        }
        self._depth, self._left_out = 0, 0.0
        self.start()

    def start(self) -> None:
        """Begin a step here: what came before, such as loading, belongs to none."""
        self._since, self._left_out = self._working(), 0.0

    @contextmanager
    def aside(self, kind: Aside) -> Iterator[None]:
        """Leave the time of the block out of its step."""
        started, self._depth = self._working(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
        took = self._working() - started
        self._asides[kind].append(took)
        # What waits for an index may save for it.
        if not self._depth:
            self._left_out += took

    def step_ended(self) -> None:
        """Another step is complete."""
        now = self._working()
        # The first step of a call warms caches up, and reads data that later ones find.
        if self._taken == 1:
            self._steps.clear()
        self._taken += 1
        self._steps.append(max(now - self._since - self._left_out, 0.0))
        self._since, self._left_out = now, 0.0

    def expect(self, kind: Aside, seconds: float | None) -> None:
        """Expect that of evaluations or saves until one is measured: what an interrupted call measured."""
        if seconds is not None and not self._asides[kind]:
            self._asides[kind].append(seconds)

    def last(self, kind: Aside) -> float:
        """Seconds of the last evaluation, save or wait, compiling left out; 0 before the first."""
        return self._asides[kind][-1] if self._asides[kind] else 0.0

    def metrics(self, done: int) -> dict[str, float]:
        """`seconds_each` of a step, and `seconds_left` as of `seconds`; nothing before a step."""
        left = self.seconds(done)
        return {} if left is None else {"seconds_each": typical(self._steps), "seconds_left": left}

    def seconds(self, done: int) -> float | None:
        """Seconds left after `done` steps, when these are evaluated and not yet saved; None before a step."""
        if not self._steps:
            return None
        left = max(self._total - done, 0) * typical(self._steps)
        evaluations = _times(done, self._total, self._eval_every) if self._eval_every else 0
        # Every evaluation is saved, and the last step is.
        saves = _times(done - 1, self._total, self._save_every, self._eval_every)
        coming: dict[Aside, int] = {"evaluation": evaluations, "save": saves}
        for kind, times in coming.items():
            seen = self._asides[kind]
            left += times * (typical(seen) if seen else 0.0)
        return left

    def _working(self) -> float:
        """A clock that stands still while programs compile."""
        return self._clock() - self._compiling()


def _times(after: int, total: int, *every: int) -> int:
    """How many of the steps after+1 … total are a multiple of one of `every` (0 is none), or the last one."""
    each = [steps for steps in every if steps > 0]

    def multiples(steps: int) -> int:
        return total // steps - max(after, 0) // steps

    count = sum(map(multiples, each))
    if len(each) == 2:
        count -= multiples(math.lcm(*each))
    missed = after < total and not any(total % steps == 0 for steps in each)
    return count + missed
