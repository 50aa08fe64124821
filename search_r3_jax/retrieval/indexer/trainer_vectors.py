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
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat, read_beat
from search_r3_jax.retrieval.indexer.publishing import Publisher, encoding_folder
from search_r3_jax.retrieval.store.corpus_vectors import join_shards
from search_r3_jax.retrieval.store.versions import IndexGateError, IndexVersionError

READY = "ready.json"
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


class TrainerVectorsPublisher:
    """The indexer of a run with `index.source trainer` or `start`: it builds and publishes, without a model.

    Where no version can be made, the vectors stay, so the trainer does not encode them again.
    """

    def __init__(self, run: Path, config: RunConfig, collection: Collection, heartbeat: Heartbeat):
        self._run, self._heartbeat = run, heartbeat
        self._publisher = Publisher(run, config, collection, heartbeat)
        self._publisher.check_current(embed_id=None)

    def advance(self) -> bool:
        """Publish the newest vectors that are ready; returns whether there was work."""
        publisher = self._publisher
        publisher.check_rejected()
        ready = _ready_steps(self._run)
        newest = max(ready, default=None)
        if newest is None or newest == publisher.abandoned:
            last = read_beat(self._run)
            # Keep the message of the last failure in the file.
            if last is None or last.phase not in ("refused", "failed"):
                self._heartbeat.beat("waiting", step=-1 if newest is None else newest)
            return False
        for older in ready[:-1]:
            shutil.rmtree(encoding_folder(self._run) / str(older), ignore_errors=True)
        folder = encoding_folder(self._run) / str(newest)
        try:
            of_trainer = ReadyVectors(**json.loads((folder / READY).read_text(encoding="utf-8")))
            with self._heartbeat.ticking():
                vectors = join_shards(folder)
            publisher.publish(newest, vectors, **asdict(of_trainer))
        except (ValueError, KeyError, TypeError) as error:
            logger.info(f"{folder}: {error}; waiting for the trainer to encode it again")
            (folder / READY).unlink(missing_ok=True)
        except (IndexGateError, IndexVersionError) as error:
            publisher.abandon(newest, str(error))
        except (UserError, OSError) as error:
            message = f"index v{newest}: cannot be written ({error}); trying again"
            logger.info(message)
            self._heartbeat.beat("failed", step=newest, message=message)
            time.sleep(RETRY_SECONDS)
        else:
            shutil.rmtree(folder)
        return True


def _ready_steps(run: Path) -> list[int]:
    """The steps whose vectors are ready, ascending."""
    return sorted(
        int(folder.name)
        for folder in encoding_folder(run).glob("*/")
        if folder.name.isdigit() and is_ready(folder)
    )
