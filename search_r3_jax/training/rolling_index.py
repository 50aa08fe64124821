"""An index that rolls: each step encodes some documents with the current parameters, in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from search_r3_jax.config import RunConfig
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import UserError, not_written
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.retrieval.environment.environment import Environment
from search_r3_jax.retrieval.index.device import DeviceIndex
from search_r3_jax.retrieval.store.rolling_dumps import Dump, RollingDumps, discard_dumps_after
from search_r3_jax.retrieval.store.vector_files import CHUNK_ROWS
from search_r3_jax.training.index_state import IndexedCorpus, IndexStart, IndexStatistics
from search_r3_jax.training.live_index import make_environment

CURSOR = "rolling_cursor"
logger = logging.getLogger(__name__)


class RollingVectors:
    """The corpus' vectors on the devices; implements `Index` in process 0, which says what happens to them.

    Every process of a run has one, and holds the rows of its devices.
    """

    def __init__(self, team: Team, corpus: IndexedCorpus):
        """All processes encode together, by `corpus.encode`."""
        config, ids = corpus.config.index, corpus.collection.document_ids
        dtype = np.dtype(np.float32 if config.vector_dtype == "float32" else ml_dtypes.bfloat16)
        # Not in memory: each device makes its own rows of it.
        nothing = np.broadcast_to(np.zeros(corpus.dim, dtype), (len(ids), corpus.dim))
        self._index = DeviceIndex(nothing, ids, 0, recall=config.recall_gate)
        self._encode_rows = corpus.encode
        self.kind, self.shape, self.ids_hash = self._index.kind, self._index.shape, self._index.ids_hash
        self._search_all = team.together("search index", self._search)
        self.take = team.together("take of index", self._index.take)
        self.encode = team.together("encode into index", self._encode)
        self.put = team.together("put into index", self._put)

    @property
    def version(self) -> int:
        """The step whose parameters encoded the oldest row."""
        return int(self.encoded_at.min())

    @property
    def encoded_at(self) -> np.ndarray:
        """The step whose parameters encoded each row [N] int64."""
        return self._index.encoded_at

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E]."""
        return self._search_all(queries, np.array([k]))

    def _search(self, queries: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._index.search(queries, int(k[0]))

    def _encode(self, rows: np.ndarray, step: np.ndarray) -> np.ndarray:
        vectors = self._encode_rows(rows)
        self._put(rows, vectors, np.broadcast_to(step, len(rows)))
        return vectors

    def _put(self, rows: np.ndarray, vectors: np.ndarray, steps: np.ndarray) -> None:
        self._index.put(rows, vectors, steps)


class RollingIndex:
    """Re-encodes the next rows before each step; no versions, no indexer. `LiveIndex` has the same methods.

    Of several processes only process 0 has one; `LedIndex` tells the others. A document that a step refreshes
    goes into the index as well. Dumps beside the checkpoints hold the vectors: what has changed since the
    dump before, and all of them once that adds up to the corpus.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        dumps: RollingDumps,
        vectors: RollingVectors,
        *,
        start: IndexStart,
    ):
        """`vectors` are those at `start`."""
        self._run, self._config, self._dumps = run, config.index, dumps
        self._vectors, self._step, self._next_step = vectors, start.step, start.step
        self._statistics = replace(start.statistics, version=vectors.version)
        self.environment: Environment = make_environment(config, vectors, self._encode)
        self._started, self._stalled, self._cursor = time.perf_counter(), 0.0, 0
        if start.arrays:
            self._cursor = int(start.arrays[CURSOR])
            self.environment.restore(start.arrays)

    @classmethod
    def open(
        cls,
        run: Path,
        corpus: IndexedCorpus,
        vectors: RollingVectors,
        *,
        start: IndexStart,
        on_wait: Callable[[int], object],
    ) -> RollingIndex:
        """Read the index at `start` from its dumps, or encode the corpus where a run begins.

        Raises UserError where the dumps of a checkpoint are gone, and that is not allowed.
        """
        config = corpus.config
        corpus_hash = corpus.collection.corpus_hash()
        dumps = RollingDumps(run, vectors.shape, config.index.vector_dtype, corpus_hash)
        begins = start.step == 0 and 0 not in dumps.steps()
        try:
            found = [] if begins else dumps.read(start.step)
        except UserError:
            if not start.allow_other_version:
                raise
            found, start = [], replace(start, arrays={})
        # These steps are taken again, by other processes perhaps, or with another index.
        discard_dumps_after(run, start.step)
        if found:
            _fill(vectors, found)
            return cls(run, config, dumps, vectors, start=start)
        _encode_all(vectors, start.step, on_wait=on_wait)
        index = cls(run, config, dumps, vectors, start=start)
        index.write_dump(start.step)
        return index

    @property
    def statistics(self) -> IndexStatistics:
        """As version: the step whose parameters encoded the oldest row."""
        return self._statistics

    def before_step(self, step: int, save: Callable[[], object]) -> dict[str, float]:
        """Encode the next rows with the parameters of this step; returns the seconds that it took."""
        started = time.perf_counter()
        self._step, self._next_step = step, step + 1
        count = min(self._config.documents_per_step, self._vectors.shape[0])
        rows = (self._cursor + np.arange(count, dtype=np.int32)) % self._vectors.shape[0]
        self._cursor = (self._cursor + count) % self._vectors.shape[0]
        # At the first step all rows are of these parameters already.
        rows = rows[self._vectors.encoded_at[rows] < step]
        if len(rows):
            self._vectors.encode(rows, np.array([step]))
            self.environment.forget(rows)
        self._statistics = replace(self._statistics, version=self._vectors.version)
        took = time.perf_counter() - started
        self._stalled += took
        share = self._stalled / max(time.perf_counter() - self._started, 1e-9)
        return {"swap_seconds": took, "index_wait_seconds": 0.0, "index_stall_share": share}

    def checkpoint_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint of the step that comes next; the vectors are dumped beside it."""
        self.write_dump(self._next_step)
        return self.environment.state() | {CURSOR: np.array(self._cursor, np.int64)}

    def write_dump(self, step: int) -> None:
        """Write what has changed since the dump before, and delete dumps that no checkpoint needs."""
        N = self._vectors.shape[0]
        before = [each for each in self._dumps.steps() if each < step]
        rows = np.flatnonzero(self._vectors.encoded_at >= (before[-1] if before else 0))
        if self._dumps.rows_since_whole(step) + len(rows) >= N:
            rows = np.arange(N)
        blocks = (rows[at : at + CHUNK_ROWS].astype(np.int32) for at in range(0, len(rows), CHUNK_ROWS))
        try:
            self._dumps.write(
                step, rows, self._vectors.encoded_at[rows], (self._vectors.take(block) for block in blocks)
            )
        except OSError as error:
            raise not_written(
                f"{self._run}: the index of step {step}",
                error,
                "make room, then the same command goes on from the last checkpoint",
            ) from error
        self._dumps.prune(checkpoint_steps(self._run))

    def checkpoint_saved(self) -> None:
        """Nothing: drift is not measured where no indexer waits for a checkpoint."""

    def drifted(self, step: int) -> tuple[bool, dict[str, float]]:
        """Never: see `checkpoint_saved`."""
        return False, {}

    def check(self) -> None:
        """Nothing: no work is done in the background."""

    def close(self) -> None:
        """Nothing is open."""

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        """What a step refreshes is fresh in the index too."""
        return self._vectors.encode(rows, np.array([self._step]))


def check_rolling(config: RunConfig, replay: Path | None) -> None:
    """Raise UserError where other settings do not fit `index.source rolling`."""
    index = config.index
    if index.source != "rolling":
        return
    if index.kind != "device":
        raise UserError(
            f"index.kind: {index.kind}: with index.source rolling, rows change in place; give device"
        )
    if index.scoring == "consistent_stale":
        raise UserError(
            "index.scoring: consistent_stale: with index.source rolling the rows are of different steps; "
            "give fresh or stale"
        )
    for name, value in (
        ("index.drift_every", index.drift_every),
        ("index.max_index_age_steps", index.max_index_age_steps),
        ("rl.min_swaps", config.rl.min_swaps),
    ):
        if value:
            raise UserError(f"{name}: {value}: index.source rolling has no index versions; give 0")
    if replay is not None:
        raise UserError("--replay: a run with index.source rolling has no schedule to repeat; leave it out")


def _fill(vectors: RollingVectors, dumps: Sequence[Dump]) -> None:
    for dump in dumps:
        for rows, steps, block in dump.blocks():
            vectors.put(rows, np.asarray(block, np.float32), steps)


def _encode_all(vectors: RollingVectors, step: int, *, on_wait: Callable[[int], object]) -> None:
    """Encode the corpus with the current parameters."""
    N, said = vectors.shape[0], time.monotonic()
    logger.info("encoding %d documents for the index", N)
    for at in range(0, N, CHUNK_ROWS):
        vectors.encode(np.arange(at, min(at + CHUNK_ROWS, N), dtype=np.int32), np.array([step]))
        on_wait(step)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            logger.info("%d of %d documents are encoded", at + CHUNK_ROWS, N)
