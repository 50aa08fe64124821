"""The indexer process: follows a run's snapshots, encodes the corpus with the newest, and publishes an index version."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.data.development import for_stage_2, load_training_sets
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json
from search_r3_jax.hub.checkpoint import load_model, with_lora
from search_r3_jax.hub.snapshots import latest_snapshot, read_run, read_snapshot, start_of, start_step_of
from search_r3_jax.models.lora import merge_lora, trainable_filter
from search_r3_jax.retrieval.versions import current_version, prune_versions, publish_version
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter

POLL_SECONDS = 0.5
PROBE_QUERIES = 64


def index_folder(run: Path) -> Path:
    """Where a run keeps its index versions (absolute: ScaNN asks for it)."""
    return (run / "index").absolute()


def run_indexer(run: Path, *, parent: int | None = None) -> None:
    """Follow `run` until stopped; with `parent` it ends as soon as that process is gone, however it went."""
    config, record = read_run(run)
    if "data" not in record:
        raise UserError(f"{run / 'config.json'}: data: missing; only a run of stage 2 has an index")
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    os.nice(config.index.nice)
    worker = IndexWorker(run, config, record)
    while True:
        newest = latest_snapshot(run)
        if newest is not None and newest != current_version(index_folder(run)):
            worker.build(newest)
        time.sleep(POLL_SECONDS)


def start_relative(run: Path, recorded: str) -> Path:
    """A path that a run recorded relative to itself."""
    return (run / recorded).resolve()


class IndexWorker:
    """Holds the corpus and the model that a run started from, and makes a version of each snapshot it is given."""

    def __init__(self, run: Path, config: RunConfig, record: dict[str, Any]):
        self._run, self._config = run, config
        data = dataclasses.replace(config.data, sets=(str(start_relative(run, record["data"])),), split=record["split"])
        self._collection = for_stage_2(load_training_sets(data)[0], data).train
        start = load_model(
            start_of(run, record), step=start_step_of(record), compute_dtype=config.compute_dtype, attention=config.attention
        )
        # Merged parameters have the structure of the model without adapters, so one encoder serves every snapshot.
        self._encoder = Encoder(nnx.split(start.decoder)[0], Prompter(start.tokenizer))
        self._model = with_lora(start, config.lora, seed=config.seed)

    def build(self, step: int) -> None:
        """Encode the corpus with the snapshot of `step` and publish it; `indexer.json` tells how far it is."""
        started = time.time()
        config, decoder = self._config, self._model.decoder
        params = nnx.state(decoder, trainable_filter(decoder))
        nnx.update(decoder, read_snapshot(self._run, step, params))
        state = nnx.state(merge_lora(decoder))
        texts = [document.body for document in self._collection.documents]
        probes = [query.text for query in self._collection.queries[:PROBE_QUERIES]]
        done = 0

        def heartbeat(finished: int) -> None:
            nonlocal done
            done += finished
            beat = {"step": step, "encoded": done, "documents": len(texts), "time": time.time(), "pid": os.getpid()}
            write_json(self._run / "indexer.json", beat)

        vectors = self._encoder.encode(state, texts, max_tokens=config.text.max_document_tokens, on_progress=heartbeat)
        encoded = time.time()
        publish_version(
            index_folder(self._run),
            step=step,
            vectors=vectors,
            ids=[document.doc_id for document in self._collection.documents],
            manifest_fields={
                "parameter_hash": parameter_hash(nnx.state(decoder, trainable_filter(decoder))),
                "corpus_hash": self._collection.corpus_hash(),
                "embed_token_id": self._model.embed_id,
                "pooling": "embed_token",
                "max_document_tokens": config.text.max_document_tokens,
                "encode_seconds": encoded - started,
            },
            kind=config.index.kind,
            recall_gate=config.index.recall_gate,
            probe_queries=self._encoder.encode(state, probes, max_tokens=config.text.max_query_tokens),
            threads=config.index.threads,
        )
        prune_versions(index_folder(self._run), keep=config.index.keep_versions)


def parameter_hash(params: nnx.State) -> str:
    """sha256 over every array's path and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _exit_with(parent: int) -> None:
    # Polling, because a killed parent sends nothing.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
