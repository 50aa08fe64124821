"""A run of stage 2 as an indexer finds it: a config, a data set, and checkpoints that differ."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from helpers.tiny_models import word_collection

from search_r3_jax.config import IndexConfig, LoraConfig, RunConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.hub.snapshot_reader import snapshot_dtype
from search_r3_jax.models.lora import merge_lora, trainable_filter
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter

T = TypeVar("T")
SOURCES = str(Path(__file__).resolve().parents[2])


class IndexedRun:
    """The run, and what its checkpoints' vectors should be."""

    def __init__(
        self,
        place: Path,
        model: Path,
        *,
        documents: int = 40,
        rank: int = 4,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        **index: Any,
    ):
        self.path = place / "run"
        self.path.mkdir(parents=True)
        collection = word_collection(documents=documents, queries=10)
        build_dataset({"train": collection}, place / "data", name="words", source={"kind": "test"})
        self.config = RunConfig(
            model=str(model),
            compute_dtype=compute_dtype,
            text=TextConfig(max_query_tokens=16, max_document_tokens=32),
            lora=LoraConfig(rank=rank),
            index=dataclasses.replace(IndexConfig(kind="exact", nice=0, keep_versions=1), **index),
        )
        self.record = {
            "stage": "rl",
            "config": dataclasses.asdict(self.config),
            "data": "../data",
            "split": "train",
        }
        (self.path / "config.json").write_text(json.dumps(self.record))
        self.collection: Collection = collection
        self.model: LoadedModel = with_lora(
            load_model(model, compute_dtype=compute_dtype), self.config.lora, seed=0
        )

    @property
    def corpus_hash(self) -> str:
        return self.collection.corpus_hash()

    def params(self, step: int) -> nnx.State:
        """Trainable parameters of a step: those of the start, and noise that grows with it."""
        generator = np.random.default_rng(step)
        start = nnx.state(self.model.decoder, trainable_filter(self.model.decoder))
        return jax.tree.map(lambda x: x + 0.02 * step * generator.normal(size=x.shape).astype(x.dtype), start)

    def save(self, *steps: int, keep: int = 9) -> None:
        """Commit checkpoints and their snapshots."""
        writer = CheckpointWriter(self.path, keep=keep, snapshot_dtype=snapshot_dtype(self.config))
        for step in steps:
            writer.save(step, self.params(step), {"count": np.zeros(1)}, {})
        writer.close()

    def vectors(self, step: int) -> np.ndarray:
        """The corpus under the parameters of a step, encoded here."""
        decoder = nnx.clone(self.model.decoder)
        nnx.update(decoder, self.params(step))
        graph, state = nnx.split(merge_lora(decoder))
        texts = [document.body for document in self.collection.documents]
        return Encoder(graph, Prompter(self.model.tokenizer)).encode(state, texts, max_tokens=32)

    def follower(self, fault: str = "", **settings: Any) -> IndexFollower:
        """The trainer's side, with an indexer process that meets a fault of `faulty_indexer.py`, once."""
        program = str(Path(__file__).parent / "faulty_indexer.py")
        # The test's own interpreter and sources, wherever they are.
        command = [
            "env",
            f"PYTHONPATH={os.pathsep.join([SOURCES, os.environ.get('PYTHONPATH', '')])}",
            *_python(),
            program,
            str(self.path),
            str(os.getpid()),
            fault,
        ]
        index = dataclasses.replace(self.config.index, **settings)
        return IndexFollower(
            self.path, self.corpus_hash, self.model.embed_id, settings=index, command=command
        )

    def log(self) -> str:
        """What the indexer printed."""
        return (self.path / "indexer.log").read_text()


def until(
    found: Callable[[], T | None], *, seconds: float = 60, meanwhile: Sequence[Callable[[], object]] = ()
) -> T:
    """What `found` gives as soon as it is not None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = found()
        if result is not None:
            return result
        for each in meanwhile:
            each()
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s")


def _python() -> list[str]:
    import sys

    return [sys.executable]
