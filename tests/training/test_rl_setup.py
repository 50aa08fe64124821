"""What stage 2 cannot work with is refused before its first step."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.rl_runs import CONFIG, run_it
from helpers.tiny_models import word_collection

from search_r3_jax.config import (
    DataConfig,
    InfoNceConfig,
    RewardConfig,
    SamplerConfig,
)
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet, for_stage_2
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora


def with_first_query(**changes: Any) -> Collection:
    collection = word_collection(documents=40, queries=20)
    first, *others = collection.queries
    return dataclasses.replace(collection, queries=(dataclasses.replace(first, **changes), *others))


@pytest.mark.parametrize(
    ("change", "collection", "named"),
    [
        ({"rl": {"group_size": 1}}, {}, "rl.group_size"),
        ({"rl": {"sampler": SamplerConfig(temperature=0.0)}}, {}, "rl.sampler.temperature: 0.0: give"),
        ({"index": {"candidates": 1000}}, {}, "index.candidates"),
        ({"rl": {"micro_queries": 2}}, {}, "rl.micro_queries: 2: does not divide rl.global_queries 3"),
        ({"rl": {"global_queries": 21}}, {}, "rl.global_queries: 21: there are 20"),
        (
            {"rl": {"infonce": InfoNceConfig(negatives=38)}},
            {},
            "rl.infonce.negatives: 38: the corpus has 40 documents.*give 0 to 37",
        ),
        ({"rl": {"infonce": InfoNceConfig(negatives=-1)}}, {}, "rl.infonce.negatives: -1"),
        (
            {"rl": {"infonce": InfoNceConfig(near_duplicate_cosine=1.1)}},
            {},
            "near_duplicate_cosine: 1.1: give a number from -1 to 1",
        ),
        ({"rl": {"inner_epochs": 0}}, {}, "rl.inner_epochs: 0"),
        (
            {"rl": {"min_tokens": 9}},
            {},
            "rl.min_tokens: 9: at most rl.sampler.max_think_tokens 8 are written",
        ),
        ({"rl": {"sample_every": 0}}, {}, "rl.sample_every: 0"),
        ({"rl": {"off_policy_steps": 1}}, {}, "rl.importance_cap: 0: .*give a cap"),
        ({"rl": {"off_policy_steps": 2}}, {}, "rl.off_policy_steps: 2: give"),
        ({"rl": {"reward": RewardConfig(length_weight=0.1, free_tokens=8)}}, {}, "free_tokens 8"),
        ({"rl": {"reward": RewardConfig(floor_gap=0.0)}}, {}, "floor_gap: 0"),
        ({}, {"text": " \t"}, "words: query 'q0': is empty"),
        ({}, {"positives": {}}, "words: query 'q0': has no relevant document"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_step(
    tiny_model: LoadedModel,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    collection: dict[str, Any],
    named: str,
) -> None:
    rl, index = (
        dataclasses.replace(CONFIG.rl, **change.get("rl", {})),
        dataclasses.replace(CONFIG.index, **change.get("index", {})),
    )
    data = TrainingSet(train=with_first_query(**collection), dev=None)
    with pytest.raises(UserError, match=named):
        run_it(dataclasses.replace(CONFIG, rl=rl, index=index), tmp_path / "run", data, tiny_model)
    assert not (tmp_path / "run").exists()


def test_a_model_that_embeds_no_numbers_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(tiny_folders["llama"])
    scale = nnx.state(model.decoder, nnx.PathContains("final_norm"))
    nnx.update(model.decoder, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), scale))
    data = TrainingSet(train=word_collection(documents=40, queries=20), dev=None)
    with pytest.raises(UserError, match="embeddings are not finite"):
        run_it(CONFIG, tmp_path / "run", data, with_lora(model, CONFIG.lora, seed=0))
    assert not (tmp_path / "run").exists()


def test_stage_2_trains_on_fewer_queries_and_searches_what_they_judge() -> None:
    whole = TrainingSet(train=word_collection(documents=40, queries=20), dev=None)
    small = for_stage_2(whole, DataConfig(rl_queries=5, rl_documents=12)).train
    assert len(small.queries) == 5
    assert len(small.documents) == 12
    assert {doc_id for query in small.queries for doc_id in query.positives} <= {
        document.doc_id for document in small.documents
    }
    assert all(query in whole.train.queries for query in small.queries)
    unjudged = TrainingSet(train=with_first_query(positives={}), dev=None)
    kept = for_stage_2(unjudged, DataConfig()).train
    assert [query.query_id for query in kept.queries] == [f"q{i}" for i in range(1, 20)]
    assert len(kept.documents) == 40
