"""The indexer: encodes the corpus with a run's newest snapshot and publishes an index version."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import for_stage_2, load_training_sets
from search_r3_jax.errors import EmbeddingError, TransientError, UserError
from search_r3_jax.files import write_text
from search_r3_jax.hub.checkpoint_reader import read_run, starting_model, starting_step
from search_r3_jax.hub.load_model import load_model, with_lora, with_recorded_prompts
from search_r3_jax.hub.snapshot_reader import (
    as_snapshot,
    latest_snapshot,
    pin_snapshots,
    read_snapshot,
    snapshot_dtype,
    snapshot_folder,
)
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.mesh import mesh_from_config
from search_r3_jax.models.lora import merge_lora, trainable_filter
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat, only_indexer
from search_r3_jax.retrieval.indexer.publishing import Publisher, encoding_folder
from search_r3_jax.retrieval.indexer.resources import end_with, limit_resources
from search_r3_jax.retrieval.indexer.trainer_vectors import TrainerVectorsPublisher
from search_r3_jax.retrieval.store.corpus_vectors import (
    RECORD,
    SHARD_DOCUMENTS,
    WAIT_SECONDS,
    EncodingSettings,
    Share,
    encode_corpus,
    is_encoded_with,
)
from search_r3_jax.retrieval.store.versions import IndexGateError, list_versions, read_version
from search_r3_jax.rollout.encoder import Encoder

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
RETRY_SECONDS = 10.0
PROBE_QUERIES = 64
PIN, TASK = "indexer", "step"


class SnapshotGoneError(Exception):
    """A snapshot was deleted before it had been read."""


def run_indexer(run: Path, *, parent: int | None = None, process: int = 0, processes: int = 1) -> None:
    """Follow `run` until stopped; with `parent`, end when that process has ended in any way.

    Several processes share the encoding; process 0 chooses the snapshot, builds and publishes. Raises
    UserError when `run` is no run of stage 2, or another indexer follows it.
    """
    if not 0 <= process < processes:
        raise UserError(f"--process: {process} of {processes}: give 0 to {processes - 1}")
    config, record = read_run(run)
    if "data" not in record:
        raise UserError(f"{run / 'config.json'}: data: missing; only a run of stage 2 has an index")
    if config.index.source == "rolling":
        raise UserError(
            f"{run / 'config.json'}: index.source: rolling: the trainer needs no indexer; start none"
        )
    if config.index.source != "snapshots" and processes > 1:
        raise UserError(
            f"--processes: {processes}: with index.source {config.index.source} the trainer encodes; start "
            "one"
        )
    if parent is not None:
        end_with(parent)
    with only_indexer(run, process):
        limit_resources(config.index)
        heartbeat = Heartbeat(run, process)
        heartbeat.beat("starting")
        with heartbeat.ticking():
            if config.index.source == "snapshots":
                worker = IndexWorker(run, config, record, heartbeat, process=process, processes=processes)
            else:
                collection = recorded_collection(run, config, record)
                worker = TrainerVectorsPublisher(run, config, collection, heartbeat)
        while True:
            if not worker.advance():
                time.sleep(POLL_SECONDS)


def start_relative(run: Path, recorded: str) -> Path:
    """Resolve a path that a run recorded relative to its folder."""
    return (run / recorded).resolve()


def recorded_collection(run: Path, config: RunConfig, record: dict[str, Any]) -> Collection:
    """The collection that a run of stage 2 trains on."""
    data = dataclasses.replace(
        config.data, sets=(str(start_relative(run, record["data"])),), split=record["split"]
    )
    return for_stage_2(load_training_sets(data, stored=True)[0], data).train


class IndexWorker:
    """Holds the corpus and the model, and publishes a version of each newest snapshot."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        record: dict[str, Any],
        heartbeat: Heartbeat,
        *,
        process: int = 0,
        processes: int = 1,
    ):
        self._process, self._processes = process, processes
        self._run, self._config, self._heartbeat = run, config, heartbeat
        self._collection = recorded_collection(run, config, record)
        mesh = mesh_from_config(config.index.mesh)
        start = load_model(
            starting_model(run, record),
            step=starting_step(record),
            compute_dtype=config.compute_dtype,
            attention=config.attention,
            mesh=mesh,
        )
        start = with_recorded_prompts(start, run, record)
        # Merged parameters have the structure of the model without adapters, so one encoder serves every
        # snapshot.
        self.encoder = Encoder(nnx.split(start.decoder)[0], start.prompter(), mesh=mesh)
        self._model = with_lora(start, config.lora, seed=config.seed)
        nnx.update(self._model.decoder, as_snapshot(self._trainable(), snapshot_dtype(config)))
        self._publisher = Publisher(run, config, self._collection, heartbeat)
        self._shards = encoding_folder(run)
        self._last_assisted_step: int | None = None
        self._encoded = 0
        self._pin = f"{PIN}-{process}" if process else PIN
        pin_snapshots(run, self._pin, [])
        if process == 0:
            self._publisher.check_current(self._model.embed_id)

    def advance(self) -> bool:
        """Publish a version of the newest snapshot, if it has none; returns whether there was work."""
        if self._process:
            return self._encode_assigned_shards()
        self._publisher.check_rejected()
        newest = latest_snapshot(self._run)
        if newest is None or newest in (self._publisher.abandoned, self._publisher.current()):
            self._heartbeat.waiting(-1 if newest is None else newest)
            return False
        try:
            self.build(newest)
        except SnapshotGoneError as error:
            logger.info(f"{error}; taking the newest")
        except (IndexGateError, EmbeddingError) as error:
            self._publisher.abandon(newest, str(error))
        except OSError as error:
            message = f"index v{newest}: cannot be written ({error.strerror or error}); trying again"
            logger.info(message)
            self._heartbeat.beat("failed", step=newest, message=message)
            time.sleep(RETRY_SECONDS)
        return True

    def build(self, step: int) -> None:
        """Encode the corpus with the snapshot of `step` and publish it; the heartbeat reports progress.

        Raises SnapshotGoneError, IndexGateError when it is not good enough, EmbeddingError when a document
        has no finite embedding, and OSError when the disk refuses.
        """
        started = time.time()
        config = self._config
        vectors, state, of_parameters = self._encode(step)
        probes = [query.body for query in self._collection.queries[:PROBE_QUERIES]]
        self._publisher.publish(
            step,
            vectors,
            parameter_hash=of_parameters,
            embed_id=self._model.embed_id,
            encode_seconds=time.time() - started,
            probes=self.encoder.encode(state, probes, max_tokens=config.text.max_query_tokens),
        )
        shutil.rmtree(self._shards / str(step))

    def _encode(self, step: int) -> tuple[np.ndarray, nnx.State, str]:
        """Encode the corpus [N,E] with the snapshot of `step`, which is pinned meanwhile.

        Returns the vectors, memory-mapped, the snapshot's merged parameters and their hash. Raises
        SnapshotGoneError where it was deleted before, IndexGateError where a version of other parameters has
        its step.
        """
        kept = self._kept(step)
        # Until the last shard is there: the other processes read the snapshot too.
        pin_snapshots(self._run, self._pin, {step, *kept})
        try:
            state, of_parameters = self._load(step)
            return self._encode_with(step, state, of_parameters), state, of_parameters
        finally:
            pin_snapshots(self._run, self._pin, kept)

    def _load(self, step: int) -> tuple[nnx.State, str]:
        """The merged parameters of a snapshot, and the hash of what was read."""
        decoder = self._model.decoder
        self._heartbeat.beat("reading", step=step, documents=len(self._collection.documents))
        with self._heartbeat.ticking():
            nnx.update(decoder, self._read(step))
            of_parameters = parameter_hash(self._trainable())
            if self._process == 0:
                self._refuse_other(step, of_parameters)
            return nnx.state(merge_lora(decoder)), of_parameters

    def _refuse_other(self, step: int, of_parameters: str) -> None:
        """Raise IndexGateError where a version of this step was built from other parameters.

        One of a release that read float32 checkpoints may be, under bfloat16.
        """
        if step in list_versions(self._publisher.root):
            there = read_version(self._publisher.root, step).manifest["parameter_hash"]
            if there != of_parameters:
                raise IndexGateError(f"index v{step}: is there already, of other parameters, and stays")

    def _encode_with(self, step: int, state: nnx.State, of_parameters: str) -> np.ndarray:
        """Encode the corpus [N,E], or this process's shards of it, with merged parameters."""
        config, documents = self._config, self._collection.documents
        self._encoded = 0

        def progress(finished: int) -> None:
            self._encoded += finished
            self._heartbeat.beat("encoding", step=step, encoded=self._encoded, documents=len(documents))

        def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
            return self.encoder.encode(
                state, texts, max_tokens=config.text.max_document_tokens, on_progress=on_progress
            )

        progress(0)
        if self._process == 0:
            self._announce(step, of_parameters)
        return encode_corpus(
            encode,
            documents,
            self._shards / str(step),
            EncodingSettings(
                model_hash=of_parameters,
                max_tokens=config.text.max_document_tokens,
                dimension=self._model.decoder.config.hidden_size,
                dtype=config.index.vector_dtype,
                shard_documents=SHARD_DOCUMENTS,
                documents_hash=self._publisher.corpus_hash,
            ),
            share=Share(
                process=self._process,
                processes=self._processes,
                wait_seconds=0 if self._process else WAIT_SECONDS,
            ),
            on_progress=progress,
        )

    def _encode_assigned_shards(self) -> bool:
        """Encode this process's shards of the announced snapshot; returns whether there was work."""
        try:
            step = int((self._shards / TASK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            step = None
        if (
            step is None
            or step == self._last_assisted_step
            or not (self._shards / str(step) / RECORD).exists()
        ):
            self._heartbeat.beat("waiting")
            return False
        documents = len(self._collection.documents)
        starts = range(self._process * SHARD_DOCUMENTS, documents, self._processes * SHARD_DOCUMENTS)
        assigned = sum(min(SHARD_DOCUMENTS, documents - start) for start in starts)
        try:
            self._encode(step)
            self._last_assisted_step = step
        except (SnapshotGoneError, UserError, TransientError) as error:
            if self._encoded == assigned:
                # Only the shards of others are missing; process 0 waits for those.
                self._last_assisted_step = step
            else:
                # Process 0 works on a newer snapshot, or will report the error.
                logger.info(f"snapshot {step}: {error}")
                time.sleep(RETRY_SECONDS)
        return True

    def _trainable(self) -> nnx.State:
        """The model's trainable parameters, in the dtype of a snapshot."""
        return nnx.state(self._model.decoder, trainable_filter(self._model.decoder))

    def _read(self, step: int) -> nnx.State:
        """The trainable parameters of a snapshot; raises SnapshotGoneError where it was deleted before."""
        try:
            return read_snapshot(self._run, step, self._trainable())
        except Exception as error:
            # Orbax raises different errors where files vanish.
            if (snapshot_folder(self._run) / str(step)).is_dir():
                raise
            raise SnapshotGoneError(
                f"snapshot {step} was deleted while it was read ({type(error).__name__})"
            ) from error

    def _kept(self, step: int) -> set[int]:
        """Snapshots that stay pinned after an encoding."""
        # `consistent_stale` needs the snapshot of the published version until the trainer, which swaps the
        # version in, has pinned it.
        if self._config.index.scoring != "consistent_stale":
            return set()
        published = self._publisher.current()
        return {step} if published is None else {step, published}

    def _announce(self, step: int, of_parameters: str) -> None:
        """Announce the snapshot being encoded, and remove the vectors of others."""
        for folder in self._shards.glob("*/"):
            # An earlier release may have begun to encode the same step from its float32 checkpoint.
            if folder.name != str(step) or not is_encoded_with(folder, of_parameters):
                shutil.rmtree(folder, ignore_errors=True)
        self._shards.mkdir(exist_ok=True)
        write_text(self._shards / TASK, f"{step}\n")
