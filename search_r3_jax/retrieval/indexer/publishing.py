"""Publishes a run's index versions: builds them, keeps the newest, makes rejected ones anew."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
from etils import epath

from search_r3_jax.config import IndexConfig, RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat
from search_r3_jax.retrieval.store.versions import (
    IndexVersionError,
    PublishOptions,
    current_version,
    delete_version,
    list_versions,
    open_version,
    prune_versions,
    publish_version,
    rejected_version,
)

logger = logging.getLogger(__name__)
# How often a rejected version is built again.
MAX_REMAKES = 2


def index_folder(run: Path, folder: str = "") -> epath.Path:
    """The folder of a run's index versions: `folder` of its config, else the default in the run.

    Absolute, because ScaNN needs that.
    """
    return epath.Path(folder) if folder else epath.Path((run / "index").absolute())


def encoding_folder(run: Path) -> Path:
    """Where the vectors of a version are until it is published, in a folder for each step."""
    return run / "encoding"


class Publisher:
    """The only writer of a run's index versions."""

    def __init__(self, run: Path, config: RunConfig, collection: Collection, heartbeat: Heartbeat):
        self._config, self._collection, self._heartbeat = config, collection, heartbeat
        self.root, self.corpus_hash = index_folder(run, config.index.folder), collection.corpus_hash()
        self.abandoned: int | None = None
        """The step of which no version can be made."""
        self._remade: Counter[int] = Counter()

    def publish(
        self,
        step: int,
        vectors: np.ndarray,
        *,
        parameter_hash: str,
        embed_id: int,
        encode_seconds: float,
        probes: np.ndarray | None = None,
    ) -> None:
        """Build and publish the version of `step` from vectors [N,E], and prune the older ones.

        `probes` are the query vectors [Q,E] that measure its recall; None takes documents. Raises
        IndexGateError when it is not good enough, and OSError when the disk refuses.
        """
        index, started, documents = self._config.index, time.time(), len(self._collection.documents)
        self._heartbeat.beat("publishing", step=step, encoded=documents, documents=documents)
        with self._heartbeat.ticking():
            publish_version(
                self.root,
                step=step,
                vectors=vectors,
                ids=self._collection.document_ids,
                manifest_fields={
                    "parameter_hash": parameter_hash,
                    "corpus_hash": self.corpus_hash,
                    "embed_token_id": embed_id,
                    "pooling": "embed_token",
                    "max_document_tokens": self._config.text.max_document_tokens,
                    "encode_seconds": encode_seconds,
                },
                options=_options(index, probes),
            )
            # This is the only writer, so every temporary folder is left over from an interrupted one.
            prune_versions(self.root, keep=index.keep_versions, stale_seconds=-math.inf)
        logger.info(
            f"index v{step}: published; {encode_seconds:.1f} s to encode, {time.time() - started:.1f} s "
            "to build"
        )

    def current(self) -> int | None:
        """The version that is published last; None where there is none, or it is gone."""
        try:
            current = current_version(self.root)
        except IndexVersionError as error:
            logger.info(f"{error}; making a new one")
            return None
        return current if current in list_versions(self.root) else None

    def check_current(self, embed_id: int | None) -> None:
        """Discard the current version where it is damaged, or of another corpus or token."""
        current = self.current()
        if current is None:
            return
        try:
            open_version(
                self.root,
                current,
                expect_corpus_hash=self.corpus_hash,
                expect_embed_token_id=embed_id,
                place=False,
            )
        except IndexVersionError as error:
            logger.info(f"{error}; making it anew")
            delete_version(self.root, current)

    def check_rejected(self) -> None:
        """Delete a version that a reader rejected, so that it is built again, at most MAX_REMAKES times."""
        rejected = rejected_version(self.root)
        if rejected is None:
            return
        delete_version(self.root, rejected)
        self._remade[rejected] += 1
        if self._remade[rejected] > MAX_REMAKES:
            self.abandon(
                rejected,
                f"index v{rejected}: was refused {MAX_REMAKES + 1} times by the trainer, whose log says why",
            )
        else:
            logger.info(f"index v{rejected}: was refused by the trainer; making it anew")

    def abandon(self, step: int, message: str) -> None:
        """Make no version of this step."""
        self.abandoned = step
        logger.info(f"{message}; waiting for the next checkpoint")
        self._heartbeat.beat("refused", step=step, message=message)


def _options(index: IndexConfig, probes: np.ndarray | None) -> PublishOptions:
    return PublishOptions(
        kind=index.kind,
        recall_gate=index.recall_gate,
        parts=index.parts,
        probe_queries=probes,
        vector_dtype=index.vector_dtype,
        threads=index.threads,
    )
