"""Training and development queries: a development split, or a part of the training queries."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from search_r3_jax.config import DataConfig
from search_r3_jax.data.collection import Collection, Query, trainable
from search_r3_jax.data.dataset import load_collection, splits_of
from search_r3_jax.data.subsample import sample_corpus
from search_r3_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Queries to train on and development queries to evaluate on; no query is in both."""

    train: Collection
    dev: Collection | None


def load_training_sets(config: DataConfig, *, stored: bool = False) -> tuple[TrainingSet, ...]:
    """The data sets of a config; `stored` is that of `load_collection`.

    Raises UserError when one cannot be read, or when the config names none.
    """
    if not config.sets:
        raise UserError("data.sets: no data set; name one or more folders: --data.sets FOLDER …")
    return tuple(_load(Path(folder), config, stored) for folder in config.sets)


def _load(folder: Path, config: DataConfig, stored: bool) -> TrainingSet:
    whole = load_collection(folder, config.split, stored=stored)
    train = trainable(whole)
    if config.dev_queries == 0:
        return TrainingSet(train=train, dev=None)
    if config.dev_split in splits_of(folder):
        watched = load_collection(folder, config.dev_split, stored=stored)
        chosen = {query.query_id for query in _drawn(watched, config.dev_queries)}
        dev = dataclasses.replace(
            watched, queries=tuple(query for query in watched.queries if query.query_id in chosen)
        )
    else:
        # At most a tenth: most of a small set must remain for training.
        drawn = _drawn(train, min(config.dev_queries, len(train.queries) // 10))
        if not drawn:
            return TrainingSet(train=train, dev=None)
        # With all their judgements, as in any evaluation.
        judged = {query.query_id: query for query in whole.queries}
        queries = tuple(judged[query.query_id] for query in drawn)
        dev = dataclasses.replace(whole, split=f"{config.split}, held out", queries=queries)
    texts = {query.text for query in dev.queries}
    train = dataclasses.replace(
        train, queries=tuple(query for query in train.queries if query.text not in texts)
    )
    return TrainingSet(train=train, dev=sample_corpus(dev, config.dev_documents)[0])


def for_stage_2(training: TrainingSet, config: DataConfig) -> TrainingSet:
    """Queries and documents of stage 2: queries with a relevant document, subsampled by the config.

    Trainer and indexer derive the same corpus from the same config.
    """
    train = training.train
    queries = tuple(query for query in train.queries if query.positives)
    if config.rl_queries:
        chosen = {query.query_id for query in _drawn(train, config.rl_queries)}
        queries = tuple(query for query in queries if query.query_id in chosen)
    train = dataclasses.replace(train, queries=queries)
    if config.rl_documents:
        train = sample_corpus(train, config.rl_documents)[0]
    return dataclasses.replace(training, train=train)


def _drawn(collection: Collection, count: int) -> list[Query]:
    """`count` queries with a relevant document, by a hash of their ids."""
    judged = [query for query in collection.queries if query.positives]
    return sorted(judged, key=lambda query: hashlib.sha256(query.query_id.encode()).digest())[:count]
