"""Supervises a run's indexer process: starts it, ends it when it is silent, and restarts it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from search_r3_jax.errors import UserError
from search_r3_jax.hub.snapshot_reader import latest_snapshot
from search_r3_jax.retrieval.indexer.heartbeat import read_beat, watch_indexer

LONGEST_PAUSE = 300.0
PATIENCE = 5
logger = logging.getLogger(__name__)


class IndexerProcess:
    """A run's indexer, started here, or started elsewhere and only watched.

    The process has a separate session, so that an interrupt at the terminal reaches the trainer alone, which
    then stops it; it also watches the trainer and ends with it. Silence is measured by how long a beat has
    stayed the same, so clocks need not agree.
    """

    def __init__(
        self,
        run: Path,
        *,
        local: bool,
        silent_seconds: float,
        command: Sequence[str] | None = None,
    ):
        """`command` replaces `search-r3 indexer`; without `local` no process is started."""
        self._run, self._local, self._silent_seconds = run, local, silent_seconds
        self._command = command or [
            sys.executable,
            "-m",
            "search_r3_jax",
            "indexer",
            "--run",
            str(run),
            "--parent",
            str(os.getpid()),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._failures, self._start_at, self._elsewhere = 0, 0.0, False
        self._lease = watch_indexer(run)
        self._beat, self._beat_since, self._last_message = read_beat(run), time.monotonic(), ""

    @property
    def pid(self) -> int | None:
        """The process that runs, or None."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, unless another follows the run already; its output goes to `indexer.log`."""
        if not self._local:
            return
        if self._lease.holder() is not None:
            if not self._elsewhere:
                beat = read_beat(self._run)
                logger.info(
                    f"another indexer follows this run{f' (process {beat.pid})' if beat else ''}; using what "
                    "it publishes"
                )
            self._elsewhere, self._process, self._start_at = True, None, time.monotonic() + 10
            return
        self._elsewhere = False
        # An accelerator serves one process, and the trainer has it: the indexer computes on the CPU.
        environment = os.environ if jax.default_backend() == "cpu" else os.environ | {"JAX_PLATFORMS": "cpu"}
        with (self._run / "indexer.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        self._beat_since = time.monotonic()

    def check(self) -> None:
        """Restart the process, after a pause, if it ended or is silent, and log its messages.

        Never raises.
        """
        self._listen()
        if not self._local:
            return
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self.start()
            return
        if self._process.poll() is None and now - self._beat_since > self._silent_seconds:
            logger.info(f"the indexer has been silent for {now - self._beat_since:.0f} s; ending it")
            self._process.kill()
            self._process.wait()
        code = self._process.poll()
        if code is None:
            return
        self._process = None
        if self._lease.holder() is not None:
            # Another indexer took the lock first.
            self.start()
            return
        self._failures += 1
        pause = min(2.0 ** (self._failures - 1), LONGEST_PAUSE)
        self._start_at = now + pause
        logger.info(
            f"the indexer ended with status {code}; the index stays, starting it again in {pause:.0f} s: "
            f"{self._last_words()}"
        )

    def succeeded(self) -> None:
        """Reset the count of failures: a version was published."""
        self._failures = 0

    def raise_if_failing(self) -> None:
        """Raise UserError after more than PATIENCE crashes in a row, or a rejected checkpoint.

        Call while blocked on a new index.
        """
        if self._failures > PATIENCE:
            raise UserError(
                f"{self._run / 'indexer.log'}: the indexer ended {self._failures} times in a row: "
                f"{self._last_words()}"
            )
        beat = self._beat
        if (
            beat is not None
            and beat.phase == "refused"
            # A snapshot that came since has not been tried yet.
            and beat.step >= (latest_snapshot(self._run) or 0)
            and (self._process is None or beat.pid == self._process.pid)
        ):
            raise UserError(f"{self._run / 'indexer.log'}: no index to go on with: {beat.message}")

    def stop(self) -> None:
        """End the process; returns when it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _listen(self) -> None:
        beat = read_beat(self._run)
        if beat is not None and (
            self._beat is None or (beat.pid, beat.beat) != (self._beat.pid, self._beat.beat)
        ):
            self._beat, self._beat_since = beat, time.monotonic()
            if beat.message and beat.message != self._last_message:
                self._last_message = beat.message
                logger.info(f"the indexer says: {beat.message}")
        silent = time.monotonic() - self._beat_since
        if (
            silent > self._silent_seconds
            and (self._elsewhere or not self._local)
            and self._last_message != "silent"
        ):
            self._last_message = "silent"
            logger.info(
                f"the indexer, which runs elsewhere, has been silent for {silent:.0f} s; is it still there?"
            )

    def _last_words(self) -> str:
        lines = (self._run / "indexer.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"
