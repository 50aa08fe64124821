"""The trainer's side of the index: opens published versions in the background between swaps."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from etils import epath

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError, passes_by_itself
from search_r3_jax.retrieval.index.device import StoredVectors
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.indexer.supervisor import IndexerProcess
from search_r3_jax.retrieval.store import storage
from search_r3_jax.retrieval.store.manifest import MANIFEST
from search_r3_jax.retrieval.store.versions import (
    IndexVersionError,
    current_version,
    list_versions,
    mark_rejected,
    open_version,
    pin_versions,
    read_version,
)

POLL_SECONDS = 0.5
logger = logging.getLogger(__name__)


class Follower(Protocol):
    """The source of new index versions for a live index."""

    def versions_to_keep(self) -> Collection[int]:
        """Versions that must not be pruned, beside those in use."""
        ...

    def start(self) -> None:
        """Start to look for published versions."""
        ...

    def check(self) -> None:
        """Raise errors of the background thread; call between steps."""
        ...

    def newer_than(self, version: int | None, *, at_most: int) -> Index | None:
        """An open index of a step after `version` and up to `at_most`; None where there is none."""
        ...

    def wait_for_newer(
        self, version: int | None, *, at_most: int, on_wait: Callable[[], object] = lambda: None
    ) -> Index:
        """Block until `newer_than` gives an index; raises UserError when none can come."""
        ...

    def is_published(self, version: int, *, local_only: bool = False) -> bool:
        """Whether a version is published, here or in a replayed run (not with `local_only`)."""
        ...

    def wait_for(self, version: int, *, on_wait: Callable[[], object] = lambda: None) -> None:
        """Block until a version is published; raises as `wait_for_newer`."""
        ...

    def open_version(self, version: int) -> Index:
        """Open a version of the schedule; raises UserError where it cannot be opened."""
        ...

    def version_stats(self, version: int) -> dict[str, float]:
        """Step, recall@10 against exact search, seconds to encode and to build."""
        ...

    def close(self) -> None:
        """Stop looking."""
        ...


class IndexFollower:
    """Finds, checks and opens new versions of a run's index in the background; implements `Follower`.

    Opening reads a whole version, which takes seconds; swapping to one that is open takes none. Of several
    processes only process 0 follows the index.
    """

    def __init__(
        self,
        run: Path,
        corpus_hash: str,
        embed_id: int,
        *,
        settings: IndexConfig | None = None,
        command: Sequence[str] | None = None,
        versions_to_keep: Callable[[], Collection[int]] = tuple,
        replayed: Sequence[epath.Path] = (),
        share: tuple[int, int] = (0, 1),
    ):
        """`command` replaces `search-r3 indexer`.

        `versions_to_keep` names versions that must not be pruned, beside those in use. `replayed` is where
        another run has its index, searched first for the versions of a schedule. `share` is the
        process and the number of those that share an index in parts.
        """
        self._settings = settings or IndexConfig()
        self._root = index_folder(run, self._settings.folder)
        self._roots = [*replayed, self._root]
        self._versions_to_keep = versions_to_keep
        self._open_version = functools.partial(
            open_version,
            expect_corpus_hash=corpus_hash,
            expect_embed_token_id=embed_id,
            share=share,
            # On several processes all of them put it there together, where it comes into use.
            place=share[1] == 1,
        )
        self._process = IndexerProcess(
            run,
            local=self._settings.local,
            silent_seconds=self._settings.silent_seconds,
            command=command,
        )
        # Shared with the background thread, under the lock.
        self._lock = threading.Lock()
        self._open: dict[int, Index] = {}
        self._current: int | None = None
        self._last_logged = ""
        self._error: BaseException | None = None
        # The rejected version and its manifest, which differs once the version is built again.
        self._rejected: tuple[int, str] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="index", daemon=True)

    def versions_to_keep(self) -> Collection[int]:
        """Versions that must not be pruned, beside those in use."""
        return self._versions_to_keep()

    def start(self) -> None:
        """Start the indexer process, if it runs here, and the search for published versions."""
        self._process.start()
        self._thread.start()

    def check(self) -> None:
        """Restart a dead indexer, and raise errors of the background thread; call between steps."""
        self._process.check()
        self._raise_background_error()

    def newer_than(self, version: int | None, *, at_most: int) -> Index | None:
        """Return a newer index than `version` that is open, or None; never waits.

        A version of a later step than `at_most` is left for later: a run that went back to an earlier
        checkpoint will reach it again.
        """
        self._raise_background_error()
        with self._lock:
            chosen = max((step for step in self._open if step <= at_most), default=None)
            if chosen is None or (version is not None and chosen <= version):
                return None
            index = self._open[chosen]
            self._set_current(chosen)
        self._process.succeeded()
        return index

    def wait_for_newer(
        self, version: int | None, *, at_most: int, on_wait: Callable[[], object] = lambda: None
    ) -> Index:
        """Block until `newer_than` gives an index.

        `on_wait` is called repeatedly and may raise. Raises UserError when none can come: the indexer keeps
        ending, or rejects its checkpoint.
        """
        while True:
            index = self.newer_than(version, at_most=at_most)
            if index is not None:
                return index
            self._wait(on_wait)

    def is_published(self, version: int, *, local_only: bool = False) -> bool:
        """Whether a version is published, here or (not with `local_only`) in the replayed run."""
        return any(version in list_versions(root) for root in ([self._root] if local_only else self._roots))

    def wait_for(self, version: int, *, on_wait: Callable[[], object] = lambda: None) -> None:
        """Block until a version is published; raises as `wait_for_newer`."""
        while not self.is_published(version):
            self._wait(on_wait)

    def open_version(self, version: int) -> Index:
        """Open and check a version of the schedule; raises UserError where there is none."""
        with self._lock:
            index = self._open.get(version)
            if index is not None:
                self._set_current(version)
                return index
        self._pin(version)
        problem = "it is not there"
        for root in self._roots:
            if version not in list_versions(root):
                continue
            try:
                index = self._open_version(root, version)
            except IndexVersionError as error:
                problem = str(error)
                continue
            with self._lock:
                self._set_current(version)
            return index
        raise UserError(
            f"{self._root}: v{version}: the run's schedule names this version, but {problem}; put it back, "
            "or go on with a new one, as another run: --allow-config-change"
        )

    def open_versions(self) -> list[int]:
        """Versions that are open and checked here, later than the one in use, ascending."""
        with self._lock:
            return sorted(self._open)

    def version_stats(self, version: int) -> dict[str, float]:
        """Statistics from a version's manifest: step, recall@10 against exact search, seconds."""
        root = next(root for root in self._roots if version in list_versions(root))
        manifest = read_version(root, version).manifest
        return {
            "step": version,
            "recall@10": manifest["recall_at_10"],
            "encode_seconds": manifest["encode_seconds"],
            "build_seconds": manifest["build_seconds"],
        }

    @property
    def indexer_pid(self) -> int | None:
        """The indexer process that was started here; None where there is none."""
        return self._process.pid

    def close(self) -> None:
        """End the indexer process and the background thread."""
        self._stopping.set()
        self._process.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _wait(self, on_wait: Callable[[], object]) -> None:
        self.check()
        self._process.raise_if_failing()
        on_wait()
        time.sleep(0.1)

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            try:
                step = self._next()
                if step is not None:
                    self._try_open(step)
            except BaseException as error:
                if passes_by_itself(error):
                    # The index in use stays meanwhile.
                    self._log_once(f"the index cannot be looked up ({error}); keeping the one in use")
                    continue
                # Raised in the training thread, by `check`.
                with self._lock:
                    self._error = error
                return

    def _next(self) -> int | None:
        """The version to open next, or None."""
        try:
            newest = current_version(self._root)
        except IndexVersionError as error:
            self._log_once(f"keeping the index in use: {error}")
            return None
        with self._lock:
            if newest is None or not self._is_newer(newest) or newest in self._open:
                return None
        return None if self._rejected == (newest, self._manifest_text(newest)) else newest

    def _try_open(self, step: int) -> None:
        # Pinned before it is opened, because the indexer prunes after each publication.
        self._pin(step)
        text = self._manifest_text(step)
        try:
            index = self._open_version(self._root, step)
        except IndexVersionError as error:
            self._log_once(f"keeping the index in use: {error}")
            self._rejected = (step, text)
            if current_version(self._root) == step:
                mark_rejected(self._root, step)
            return
        # Warm up: load pages and compile before the first step searches it.
        if not isinstance(index, StoredVectors):
            index.search(index.take(np.zeros(1, np.int32)), 1)
        with self._lock:
            # Training may have opened the same version meanwhile, for its schedule.
            if self._is_newer(step):
                self._open[step] = index

    def _is_newer(self, step: int) -> bool:
        return self._current is None or step > self._current

    def _set_current(self, version: int) -> None:
        """Set the version in use, and drop the earlier ones; call under the lock.

        An earlier version that stayed open would be proposed again and again.
        """
        self._open = {step: index for step, index in self._open.items() if step > version}
        self._current = version

    def _pin(self, *opening: int) -> None:
        with self._lock:
            used = {*self._open} if self._current is None else {self._current, *self._open}
            pin_versions(self._root, {*used, *opening, *self.versions_to_keep()})

    def _manifest_text(self, step: int) -> str:
        try:
            return (storage.version_path(storage.open_root(self._root), step) / MANIFEST).read_text()
        except OSError:
            return ""

    def _log_once(self, message: str) -> None:
        """Log a message, unless the last one was the same."""
        if message != self._last_logged:
            self._last_logged = message
            logger.info(message)

    def _raise_background_error(self) -> None:
        """Raise the error of the background thread, if any."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error
