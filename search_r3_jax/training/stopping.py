"""Stops training on request: at the next step boundary, saved, at the same step on all processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from search_r3_jax.errors import StoppedError

# SIGTERM comes from a preempted machine, SIGINT from the keyboard, SIGUSR1 usually from SLURM ahead of its
# time limit.
logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Turns the first of `SIGNALS` into a request to stop at the next step boundary.

    A second signal ends the process at once. Outside the main thread, where Python receives no signals,
    nothing changes.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait until a call into XLA returns, which may compile for minutes; a thread
            # that reads this pipe does not.
            self._heard, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            self._previous_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, _nothing) for number in SIGNALS}
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_wake)
            # The thread ends with the pipe.
            os.close(self._wake)

    def asked(self) -> bool:
        """Whether any process was asked to stop; every process calls it at the same step."""
        asked_here = self._asked_at is not None
        if jax.process_count() == 1:
            return asked_here
        return bool(np.any(multihost_utils.process_allgather(np.array(asked_here))))

    def stop(self, run: Path, step: int) -> None:
        """Raise StoppedError: `step` of `run` is saved, and how long after the signal."""
        grace = (
            "" if self._asked_at is None else f", {time.monotonic() - self._asked_at:.1f} s after the signal"
        )
        raise StoppedError(
            f"{run}: stopped and saved at step {step}{grace}; the same command goes on from there"
        )

    def stop_waiting(self, run: Path, step: int) -> None:
        """Call `stop` if this process was asked to; call while blocked at a step that is saved."""
        if self._asked_at is not None:
            self.stop(run, step)

    def _listen(self) -> None:
        with os.fdopen(self._heard, "rb", buffering=0) as heard:
            while number := heard.read(1):
                if self._asked_at is not None:
                    os.write(
                        sys.stderr.fileno(),
                        b"search-r3: leaving at once; the same command goes on from the last checkpoint\n",
                    )
                    os._exit(128 + number[0])
                if number[0] in SIGNALS:
                    self._asked_at = time.monotonic()
                    logger.info(
                        f"{signal.Signals(number[0]).name}: saving at the end of this step; once more leaves "
                        "at once"
                    )


def _nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal reaches the pipe only if Python has a handler."""
