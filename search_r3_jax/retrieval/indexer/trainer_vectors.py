"""Vectors that the trainer encodes: where they wait for the indexer, and the indexer that publishes them."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.files import write_json
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat
from search_r3_jax.retrieval.indexer.publishing import Publisher, encoding_folder
from search_r3_jax.retrieval.store.corpus_vectors import join_shards
from search_r3_jax.retrieval.store.versions import IndexGateError, IndexVersionError

READY, _REMOVED = "ready.json", "removed-"
RETRY_SECONDS = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadyVectors:
    """What the trainer says of a folder with the vectors of the whole corpus.

    Attributes:
        parameter_hash: of the snapshot that encoded them.
        embed_id: id of the embed token.
        encode_seconds: seconds that the devices took.
    """

    parameter_hash: str
    embed_id: int
    encode_seconds: float


def write_ready(folder: Path, vectors: ReadyVectors) -> None:
    """Say that all vectors are in `folder`: the indexer may publish them."""
    write_json(folder / READY, asdict(vectors))


def is_ready(folder: Path) -> bool:
    """Whether all vectors are in `folder`."""
    return (folder / READY).exists()


def ready_steps(run: Path) -> list[int]:
    """The steps whose vectors are ready, ascending."""
    return sorted(
        int(folder.name)
        for folder in encoding_folder(run).glob("*/")
        if folder.name.isdigit() and is_ready(folder)
    )


def remove_vectors(folder: Path) -> None:
    """Remove the vectors of a step; whoever looks finds all of them or none."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    # What another process has open may stay for a while on a share.
    shutil.rmtree(aside, ignore_errors=True)


class TrainerVectorsPublisher:
    """The indexer of a run with `index.source trainer`: it builds and publishes, without a model.

    Where no version can be made, the vectors stay, so the trainer does not encode them again.
    """

    def __init__(self, run: Path, config: RunConfig, collection: Collection, heartbeat: Heartbeat):
        self._run, self._heartbeat = run, heartbeat
        self._publisher = Publisher(run, config, collection, heartbeat)
        self._publisher.check_current(embed_id=None)
        for left in encoding_folder(run).glob(f"{_REMOVED}*/"):
            shutil.rmtree(left, ignore_errors=True)

    def advance(self) -> bool:
        """Publish the newest vectors that are ready; returns whether there was work."""
        publisher = self._publisher
        publisher.check_rejected()
        ready = ready_steps(self._run)
        newest = max(ready, default=None)
        if newest is None or newest == publisher.abandoned:
            self._heartbeat.waiting(-1 if newest is None else newest)
            return False
        for older in ready[:-1]:
            remove_vectors(encoding_folder(self._run) / str(older))
        folder = encoding_folder(self._run) / str(newest)
        try:
            of_trainer = ReadyVectors(**json.loads((folder / READY).read_text(encoding="utf-8")))
            with self._heartbeat.ticking():
                vectors = join_shards(folder)
            publisher.publish(newest, vectors, **asdict(of_trainer))
            # Its file is removed next.
            del vectors
        except (ValueError, KeyError, TypeError) as error:
            logger.info(f"{folder}: {error}; waiting for the trainer to encode it again")
            (folder / READY).unlink(missing_ok=True)
        except (IndexGateError, IndexVersionError) as error:
            publisher.abandon(newest, str(error))
        except (UserError, TransientError, OSError) as error:
            message = f"index v{newest}: cannot be written ({error}); trying again"
            logger.info(message)
            self._heartbeat.beat("failed", step=newest, message=message)
            time.sleep(RETRY_SECONDS)
        else:
            remove_vectors(folder)
        return True
