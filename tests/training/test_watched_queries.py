"""Development queries of several data sets stand beside each other."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import word_collection

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.evaluation.evaluate import EmbeddedQueries, OnProgress
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import development
from search_r3_jax.vectors import unit_vectors


class RandomVectors:
    """Evaluates without a model."""

    def __init__(self, *_: object, **__: object):
        self._generator = np.random.default_rng(0)

    def documents(self, state: nnx.State, collection: Collection, on_progress: OnProgress) -> np.ndarray:
        on_progress(len(collection.documents))
        vectors = self._generator.standard_normal((len(collection.documents), 8))
        return unit_vectors(vectors.astype(np.float32), str)

    def direct_queries(
        self, state: nnx.State, collection: Collection, on_progress: OnProgress
    ) -> EmbeddedQueries:
        on_progress(len(collection.queries))
        vectors = self.documents(state, collection, lambda _: None)[: len(collection.queries)]
        return EmbeddedQueries(vectors=vectors, seconds=1.0, warm_seconds=1.0)


def test_sets_of_one_name_are_told_apart(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(development, "Evaluator", RandomVectors)
    graph, state = nnx.split(tiny_model.decoder)
    small, large = (word_collection(documents=documents, queries=2) for documents in (2, 40))
    sets = [small, dataclasses.replace(small, name="other"), large]
    prompter = Prompter(tiny_model.tokenizer)
    evaluated = development.Development(RunConfig(), sets, graph, prompter, reasoned=False)
    told: list[tuple[str, int, int]] = []
    found = evaluated.evaluate(state, 3, tmp_path, lambda *said: told.append(said))
    results = json.loads((tmp_path / "eval" / "dev_000003.json").read_text())["results"]
    assert list(results) == ["words 1", "other", "words 2"]
    assert results["words 1"]["direct"]["ndcg@10"] > results["words 2"]["direct"]["ndcg@10"]
    assert {sample["set"] for sample in found.samples} == set(results)
    # A bar of each part, from nothing to all.
    assert told[:4] == [
        ("words 1: documents", 0, 2),
        ("words 1: documents", 2, 2),
        ("words 1: queries", 0, 2),
        ("words 1: queries", 2, 2),
    ]
    assert [kind for kind, _ in found.embeddings.labels] == ["query"] * 2 + ["document"] * 2
    assert found.embeddings.vectors.shape == (4, 8)


def test_a_sets_number_is_no_other_sets_name(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(development, "Evaluator", RandomVectors)
    graph, state = nnx.split(tiny_model.decoder)
    sets = [
        dataclasses.replace(word_collection(documents=5, queries=2), name=name)
        for name in ("test", "test", "test 2", "test", "test 2")
    ]
    prompter = Prompter(tiny_model.tokenizer)
    evaluated = development.Development(RunConfig(), sets, graph, prompter, reasoned=False)
    found = evaluated.evaluate(state, 3, tmp_path)
    results = json.loads((tmp_path / "eval" / "dev_000003.json").read_text())["results"]
    assert len(results) == len(sets)
    mean = np.mean([result["direct"]["ndcg@10"] for result in results.values()])
    assert found.scalars["dev_direct_ndcg@10"] == pytest.approx(mean, abs=1e-12)
