"""Queries to watch training on: a split of their own, or held out; never trained on."""

import dataclasses
from pathlib import Path

import pytest
from helpers.tiny_models import word_collection

from search_r3_jax.config import DataConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.data.development import load_training_sets
from search_r3_jax.errors import UserError


def built(folder: Path, splits: dict[str, Collection]) -> str:
    return str(build_dataset(splits, folder, name="words", source={"kind": "words"}))


def test_a_development_split_is_used_and_its_questions_leave_the_training(tmp_path: Path) -> None:
    collection = word_collection(documents=40, queries=40)
    dev = dataclasses.replace(collection, split="dev", queries=collection.queries[30:])
    # Query 30 to 34 are in both, under the same text.
    train = dataclasses.replace(collection, queries=collection.queries[:35])
    config = DataConfig(
        sets=(built(tmp_path / "set", {"train": train, "dev": dev}),), dev_queries=8, dev_documents=12
    )
    (found,) = load_training_sets(config)
    assert found.dev is not None
    assert (len(found.dev.queries), len(found.dev.documents)) == (8, 12)
    watched = {query.text for query in found.dev.queries}
    assert watched <= {query.text for query in dev.queries}
    assert {query.text for query in found.train.queries} == {query.text for query in train.queries} - watched
    assert len(found.train.documents) == 40


def test_without_one_a_tenth_is_held_out(tmp_path: Path) -> None:
    collection = word_collection(documents=60, queries=60)
    config = DataConfig(
        sets=(built(tmp_path / "set", {"train": collection}),), dev_queries=50, dev_documents=20
    )
    (found,) = load_training_sets(config)
    assert found.dev is not None
    assert (len(found.dev.queries), len(found.train.queries)) == (6, 54)
    assert not {query.query_id for query in found.dev.queries} & {
        query.query_id for query in found.train.queries
    }
    # It hangs on the ids, not on their order.
    turned = dataclasses.replace(collection, queries=collection.queries[::-1])
    config = dataclasses.replace(config, sets=(built(tmp_path / "turned", {"train": turned}),))
    (again,) = load_training_sets(config)
    assert again.dev is not None
    assert {query.query_id for query in again.dev.queries} == {query.query_id for query in found.dev.queries}


def test_nothing_is_watched_where_nothing_is_asked_for(tmp_path: Path) -> None:
    collection = word_collection(documents=20, queries=20)
    config = DataConfig(sets=(built(tmp_path / "set", {"train": collection}),), dev_queries=0)
    (found,) = load_training_sets(config)
    assert found.dev is None
    assert found.train.queries == collection.queries


def test_no_set_is_the_users_mistake() -> None:
    with pytest.raises(
        UserError, match=r"data\.sets: no data set; name one or more folders: --data\.sets FOLDER"
    ):
        load_training_sets(DataConfig())
