"""The model's own reasoning is kept by what it was written for."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.tiny_models import word_collection

from search_r3_jax.config import RunConfig, SamplerConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import self_generated_reasoning
from search_r3_jax.training.self_generated_reasoning import with_self_generated_reasoning


class Echo:
    """Writes each text and the limit of tokens."""

    def __init__(self, graph: object, prompter: Prompter, config: SamplerConfig, mesh: object = None):
        self._limit = config.max_think_tokens

    def sample(self, state: object, texts: list[str], seeds: object, *, max_tokens: int) -> list[str]:
        return [f"{text} {self._limit}" for text in texts]


def test_a_text_is_reused_for_the_same_query_and_limits_only(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated_reasoning, "QUERIES_PER_PASS", 4)
    monkeypatch.setattr(self_generated_reasoning, "Sampler", Echo)
    monkeypatch.setattr(self_generated_reasoning, "_thoughts", lambda texts, prompter: texts)
    passes: list[tuple[int, int]] = []

    def written(file: str, collection: Collection, tokens: int = 3) -> list[str]:
        config = RunConfig(text=TextConfig(max_thought_tokens=tokens, max_query_tokens=16))
        (result,) = with_self_generated_reasoning(
            config,
            tmp_path / file,
            [collection],
            [(0, row) for row in range(len(collection.queries))],
            tiny_model,
            lambda done, total: passes.append((done, total)),
            Team(),
        )
        return [query.reasoning for query in result.queries]

    collection = word_collection(documents=12, queries=4)
    first = written("kept.jsonl", collection)
    assert written("kept.jsonl", collection) == first
    assert passes == [(4, 4)]
    # Other texts under the same ids.
    queries = [dataclasses.replace(query, text=f"{query.text} again") for query in collection.queries]
    other = dataclasses.replace(collection, queries=tuple(queries))
    assert written("kept.jsonl", other) == written("new.jsonl", other) != first
    assert written("kept.jsonl", other, tokens=5) == written("newer.jsonl", other, tokens=5)
    assert passes == [(4, 4)] * 5
    # A file of an earlier version has no keys.
    lines = [{"set": 0, "query_id": query.query_id, "reasoning": "old"} for query in collection.queries]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert written("old.jsonl", collection) == first
