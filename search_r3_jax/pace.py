"""The pace of a piece of work and the time that it leaves, from what its recent parts took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

# Parts that the pace is of: enough for a steady number, few enough to follow work that changes.
RECENT = 20


def typical(seconds: Sequence[float]) -> float:
    """The mean without the fastest and the slowest tenth; one that hung says nothing about the others."""
    cut = len(seconds) // 10
    kept = sorted(seconds)[cut : len(seconds) - cut]
    return sum(kept) / len(kept)


class Pace:
    """Seconds that each of many like things takes, over the recent ones."""

    def __init__(
        self, *, aside: Callable[[], float] = lambda: 0.0, clock: Callable[[], float] = time.monotonic
    ):
        """`aside` gives all seconds so far that the pace leaves out, such as those of compiling."""
        self._aside, self._clock = aside, clock
        self._last: float | None = None
        self._parts: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def add(self, count: float) -> None:
        """Count that many more; the first call starts the clock, and what came before it is no part."""
        now = self._clock() - self._aside()
        if self._last is not None and count > 0:
            self._parts.append((count, max(now - self._last, 0.0)))
        self._last = now

    def seconds_each(self) -> float | None:
        """Seconds of one; None until two calls were made."""
        count = sum(count for count, _ in self._parts)
        return sum(seconds for _, seconds in self._parts) / count if count else None
