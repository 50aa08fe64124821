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
from search_r3_jax.evaluation.evaluate import EmbeddedQueries, ModeResult, exact_index, search_result
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import development
from search_r3_jax.vectors import unit_vectors


class RandomVectors:
    """Evaluates without a model."""

    def __init__(self, *_: object, **__: object):
        self._generator = np.random.default_rng(0)

    def documents(self, state: nnx.State, collection: Collection) -> np.ndarray:
        vectors = self._generator.standard_normal((len(collection.documents), 8))
        return unit_vectors(vectors.astype(np.float32), str)

    def direct(self, state: nnx.State, collection: Collection, documents_ne: np.ndarray) -> ModeResult:
        vectors = self.documents(state, collection)[: len(collection.queries)]
        queries = EmbeddedQueries(vectors=vectors, seconds=1.0, warm_seconds=1.0)
        return search_result(collection, exact_index(collection, documents_ne), queries)


def test_sets_of_one_name_are_told_apart(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(development, "Evaluator", RandomVectors)
    graph, state = nnx.split(tiny_model.decoder)
    small, large = (word_collection(documents=documents, queries=2) for documents in (2, 40))
    sets = [small, dataclasses.replace(small, name="other"), large]
    prompter = Prompter(tiny_model.tokenizer)
    evaluated = development.Development(RunConfig(), sets, graph, prompter, reasoned=False)
    _, samples = evaluated.evaluate(state, 3, tmp_path)
    results = json.loads((tmp_path / "eval" / "dev_000003.json").read_text())["results"]
    assert list(results) == ["words 1", "other", "words 2"]
    assert results["words 1"]["direct"]["ndcg@10"] > results["words 2"]["direct"]["ndcg@10"]
    assert {sample["set"] for sample in samples} == set(results)
