"""The indexer's heartbeat file, rewritten at every piece of work, and the lock of a run's indexer."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.files import write_json
from search_r3_jax.lease import LeaseHeldError, LeaseWatch, take_lease, this_machine

HEARTBEAT, LOCK = "indexer.json", "indexer.lock"
TICK_SECONDS = 5.0
Phase = Literal["starting", "waiting", "reading", "encoding", "publishing", "refused", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """The state of an indexer.

    Attributes:
      beat: a counter; while it stays the same the indexer is silent. No clocks are compared.
      pid: its process; a new one counts from 1.
      step: the checkpoint that it works on, −1 for none.
      encoded: documents finished, of `documents`.
      message: why it rejected its checkpoint or failed; empty otherwise.
      time: seconds since the epoch, for people only.
    """

    beat: int
    pid: int
    phase: Phase
    step: int = -1
    encoded: int = 0
    documents: int = 0
    message: str = ""
    time: float = 0.0


class Heartbeat:
    """Writes the heartbeat file of a run's indexer, or of one of its processes."""

    def __init__(self, run: Path, process: int = 0):
        self._file, self._lock = run / _of_process(HEARTBEAT, process), threading.Lock()
        self._last = Beat(beat=0, pid=os.getpid(), phase="starting")

    def beat(
        self, phase: Phase, *, step: int = -1, encoded: int = 0, documents: int = 0, message: str = ""
    ) -> None:
        """Write the current phase and progress."""
        with self._lock:
            self._last = Beat(
                beat=self._last.beat + 1,
                pid=os.getpid(),
                phase=phase,
                step=step,
                encoded=encoded,
                documents=documents,
                message=message,
                time=time.time(),
            )
            # A full disk must not end the indexer, which waits for space.
            with suppress(OSError):
                write_json(self._file, dataclasses.asdict(self._last))

    def waiting(self, step: int) -> None:
        """Beat while there is nothing to do for `step`; the message of a failure stays in the file."""
        last = self._last
        if last.phase in ("refused", "failed"):
            self.beat(last.phase, step=last.step, message=last.message)
        else:
            self.beat("waiting", step=step)

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Repeat the last beat every few seconds while entered, for work that reports no progress."""
        done = threading.Event()

        def tick() -> None:
            while not done.wait(TICK_SECONDS):
                last = self._last
                self.beat(
                    last.phase,
                    step=last.step,
                    encoded=last.encoded,
                    documents=last.documents,
                    message=last.message,
                )

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def read_beat(run: Path) -> Beat | None:
    """The last beat of a run's indexer; None before the first, or where the file cannot be read."""
    try:
        return Beat(**json.loads((run / HEARTBEAT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def only_indexer(run: Path, process: int = 0) -> Iterator[None]:
    """Hold the run's lease for this process of its indexer; raises UserError while another does."""
    file = run / _of_process(LOCK, process)
    try:
        lease = take_lease(file)
    except LeaseHeldError as error:
        message = (
            f"{file}: another indexer follows this run ({error.holder}); stop it first, or leave the run "
            "to it"
        )
        # One elsewhere may be on its way out.
        if error.holder.machine != this_machine():
            raise TransientError(message) from error
        raise UserError(message) from error
    try:
        yield
    finally:
        lease.release()


def watch_indexer(run: Path) -> LeaseWatch:
    """A look, now and then, at who follows a run."""
    return LeaseWatch(run / LOCK)


def _of_process(name: str, process: int) -> str:
    stem, suffix = name.split(".")
    return f"{stem}-{process}.{suffix}" if process else name
