"""The trainer's side of the index: starts the indexer process, keeps it alive, and takes in what it publishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from search_r3_jax.retrieval.index import Index
from search_r3_jax.retrieval.indexer import index_folder
from search_r3_jax.retrieval.versions import IndexVersionError, current_version, open_version, pin_versions

MAX_RESTARTS = 5


class IndexFollower:
    """One indexer process of a run, and the newest version that passed its checks.

    The process gets its own session, so an interrupt at the terminal reaches the trainer alone, which then stops it; it also watches
    the trainer and ends when that is gone.
    """

    def __init__(self, run: Path, corpus_hash: str, embed_id: int, *, say: Callable[[str], object]):
        self._run, self._corpus_hash, self._embed_id, self._say = run, corpus_hash, embed_id, say
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts, self._retry_at = 0, 0.0
        self._doubted: int | None = None

    def start(self) -> None:
        """Start the process; what it prints goes to `indexer.log`."""
        command = [sys.executable, "-m", "search_r3_jax", "indexer", "--run", str(self._run), "--parent", str(os.getpid())]
        with (self._run / "indexer.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def check(self) -> None:
        """Restart the process with back-off if it has ended; the caller goes on with the index it has.

        Raises RuntimeError when it keeps ending.
        """
        if self._process is None or self._process.poll() is None or time.monotonic() < self._retry_at:
            return
        if self._restarts == MAX_RESTARTS:
            raise RuntimeError(f"the indexer ended {MAX_RESTARTS + 1} times; its last words: {self._last_words()}")
        self._restarts += 1
        self._retry_at = time.monotonic() + 2**self._restarts
        code = self._process.returncode
        self._say(f"the indexer ended with status {code}; starting it again ({self._restarts} of {MAX_RESTARTS}): {self._last_words()}")
        self.start()

    def wait_for_first(self, on_wait: Callable[[int, int], object] | None = None) -> Index:
        """Block until there is a version to train against; `on_wait` hears of documents encoded and in all."""
        while True:
            index = self.newer_than(-1)
            if index is not None:
                return index
            self.check()
            if on_wait is not None:
                on_wait(*self.progress())
            time.sleep(0.2)

    def progress(self) -> tuple[int, int]:
        """Documents that the indexer has encoded of the version it is making, and how many there are."""
        try:
            beat = json.loads((self._run / "indexer.json").read_text(encoding="utf-8"))
            return int(beat["encoded"]), int(beat["documents"])
        except (OSError, ValueError, KeyError):
            return 0, 0

    def newer_than(self, version: int) -> Index | None:
        """The published index if it was made from a later step than `version`; None also where its checks leave a doubt."""
        root = index_folder(self._run)
        try:
            newest = current_version(root)
            if newest is None or newest <= version or newest == self._doubted:
                return None
            # Before it is opened: the indexer prunes whenever it has published.
            pin_versions(root, {newest} if version < 0 else {version, newest})
            return open_version(root, newest, expect_corpus_hash=self._corpus_hash, expect_embed_token_id=self._embed_id)
        except IndexVersionError as error:
            self._doubted = current_version(root)
            self._say(f"keeping the index in use: {error}")
            return None

    def measured(self, version: int) -> dict[str, float]:
        """What the manifest of a version says: step, recall@10 against exact search, seconds it took."""
        manifest = json.loads((index_folder(self._run) / f"v{version}" / "MANIFEST.json").read_text(encoding="utf-8"))
        return {
            "step": version,
            "recall@10": manifest["recall_at_10"],
            "encode_seconds": manifest["encode_seconds"],
            "build_seconds": manifest["build_seconds"],
        }

    def stop(self) -> None:
        """End the process; returns when it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _last_words(self) -> str:
        lines = (self._run / "indexer.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"
