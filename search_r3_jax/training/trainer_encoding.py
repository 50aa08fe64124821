"""The trainer's devices encode the corpus with a snapshot's parameters, some documents before each step."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import EmbeddingError, UserError
from search_r3_jax.hub.snapshot_reader import pin_snapshots, read_snapshot, snapshot_dtype, snapshot_steps
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.retrieval.indexer.publishing import encoding_folder, index_folder
from search_r3_jax.retrieval.indexer.trainer_vectors import (
    ReadyVectors,
    is_ready,
    ready_steps,
    remove_vectors,
    write_ready,
)
from search_r3_jax.retrieval.store.corpus_vectors import (
    EncodingSettings,
    Shard,
    is_encoded_with,
    missing_shards,
)
from search_r3_jax.retrieval.store.versions import list_versions
from search_r3_jax.training.index_state import IndexedCorpus

PIN = "trainer-encoding"
# While training waits for a version, documents are encoded for so long at a time.
WAIT_SECONDS = 1.0
# How often it is looked up whether a version that was encoded is there: a reader may have rejected it.
LOOK_SECONDS = 10.0
logger = logging.getLogger(__name__)


class SnapshotEncoder:
    """Embeds documents with the parameters of a snapshot; every process of a run has one."""

    def __init__(self, team: Team, run: Path, corpus: IndexedCorpus):
        """Process 0 says which snapshot and which rows, within `Team.lead`."""
        self._run, self._corpus = run, corpus
        self._params: nnx.State | None = None
        self.load = team.together("load snapshot to encode", self._load)
        self.encode = team.together("encode with snapshot", self._encode)
        self.drop = team.together("drop snapshot", self._drop)

    def _load(self, step: np.ndarray) -> str:
        """Read a snapshot in its own dtype; the hash of its parameters."""
        dtype = snapshot_dtype(self._corpus.config)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self._corpus.trainable
        )
        params = read_snapshot(self._run, int(step), like)
        self._params = params
        return parameter_hash(params)

    def _encode(self, rows: np.ndarray) -> np.ndarray | EmbeddingError:
        """Vectors [n,E] of rows [n], or what is wrong with them: process 0 says what becomes of it."""
        if self._params is None:
            raise RuntimeError("no snapshot is loaded")
        try:
            return self._corpus.encode_with(self._params, rows)
        except EmbeddingError as error:
            return error

    def _drop(self) -> None:
        self._params = None


class TrainerEncoding:
    """Encodes the newest snapshot that has no version yet, for the indexer to publish; process 0 has one.

    A call encodes `index.documents_per_step` documents and writes their vectors as a file of their own: which
    ones are encoded together depends on no clock, so a version is the same to the last bit whenever, and
    after how many interruptions, it was made.
    """

    def __init__(self, run: Path, corpus: IndexedCorpus, encoder: SnapshotEncoder):
        self._run, self._corpus, self._encoder = run, corpus, encoder
        self._root = index_folder(run, corpus.config.index.folder)
        self._step: int | None = None
        self._missing: list[Shard] = []
        self._hash, self._seconds = "", 0.0
        self._done: int | None = None
        self._problem, self._look_at = "", 0.0

    def advance(self) -> bool:
        """Encode the next documents; returns whether there were any."""
        if self._step is None and not self._begin():
            return False
        started = time.perf_counter()
        if self._missing:
            shard = self._missing[0]
            try:
                vectors = self._encoder.encode(np.arange(shard.start, shard.stop, dtype=np.int32))
                if isinstance(vectors, EmbeddingError):
                    raise vectors
                ids = self._corpus.collection.document_ids
                shard.write(vectors, self._corpus.config.index.vector_dtype, ids[shard.start : shard.stop])
            except EmbeddingError as error:
                self._problem = f"index v{self._step}: {error}"
                logger.info("%s; waiting for the next checkpoint", self._problem)
                self._end()
                return True
            self._missing.pop(0)
        self._seconds += time.perf_counter() - started
        if not self._missing:
            write_ready(
                encoding_folder(self._run) / str(self._step),
                ReadyVectors(
                    parameter_hash=self._hash, embed_id=self._corpus.embed_id, encode_seconds=self._seconds
                ),
            )
            self._end()
        return True

    def wait(self) -> None:
        """Encode for a while: training waits for a version. Raises UserError where none can come."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            if not self.advance():
                if self._problem and not ready_steps(self._run):
                    raise UserError(f"{self._run}: no index to go on with: {self._problem}")
                return

    def _begin(self) -> bool:
        """Take up the newest snapshot, if its corpus is not encoded yet, or one that was begun before."""
        newest = self._begun_or_newest()
        if newest is None or (newest == self._done and time.monotonic() < self._look_at):
            return False
        self._look_at = time.monotonic() + LOOK_SECONDS
        folder = encoding_folder(self._run) / str(newest)
        abandoned = newest == self._done and self._problem
        if abandoned or is_ready(folder) or newest in list_versions(self._root):
            self._done = newest
            return False
        pin_snapshots(self._run, PIN, self._pinned(newest))
        self._hash = self._encoder.load(np.array(newest))
        self._discard_unfinished(newest)
        self._missing = missing_shards(folder, self._corpus.collection.documents, self._settings())
        self._step, self._seconds, self._problem = newest, 0.0, ""
        return True

    def _begun_or_newest(self) -> int | None:
        """The newest snapshot, unless the vectors of one are there in part: a run that is often interrupted
        would never have all."""
        steps, folder = snapshot_steps(self._run), encoding_folder(self._run)
        abandoned = self._done if self._problem else None
        begun = [
            step
            for step in steps
            if (folder / str(step)).is_dir() and not is_ready(folder / str(step)) and step != abandoned
        ]
        if begun:
            published = list_versions(self._root)
            begun = [step for step in begun if step not in published]
        return max(begun or steps, default=None)

    def _pinned(self, step: int) -> set[int]:
        """Snapshots that stay while that of `step` is encoded."""
        if self._corpus.config.index.scoring != "consistent_stale":
            return {step}
        # The parameters of a version that is encoded, but not in use yet, are needed too.
        return {step, *ready_steps(self._run), *list_versions(self._root)[-1:]}

    def _discard_unfinished(self, step: int) -> None:
        """Remove vectors that nothing will finish: of other snapshots, and of this one's before a resume."""
        for folder in encoding_folder(self._run).glob("*/"):
            unfinished = folder.name != str(step) and not is_ready(folder)
            if unfinished or (folder.name == str(step) and not is_encoded_with(folder, self._hash)):
                remove_vectors(folder)

    def _end(self) -> None:
        self._encoder.drop()
        self._done, self._step, self._missing = self._step, None, []

    def _settings(self) -> EncodingSettings:
        config, collection = self._corpus.config, self._corpus.collection
        return EncodingSettings(
            model_hash=self._hash,
            max_tokens=config.text.max_document_tokens,
            dimension=self._corpus.dim,
            dtype=config.index.vector_dtype,
            shard_documents=config.index.documents_per_step,
            documents_hash=collection.corpus_hash(),
        )
