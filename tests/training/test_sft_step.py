"""The contrastive losses of a step, from a batch as the pipeline makes it, in float64 and pair by pair."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.contrastive_float64 import info_nce_by_hand, triplet_by_hand, unit_rows
from helpers.tiny_models import byte_tokenizer, word_collection

from search_r3_jax.config import Direction, SftConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PairBatch, PairPipeline
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft_step import contrastive_losses

ALL: tuple[Direction, ...] = (
    "query_to_document",
    "query_to_query",
    "document_to_query",
    "document_to_document",
)
TWO: tuple[Direction, ...] = ("query_to_document", "document_to_query")


def graded_collection() -> Collection:
    """Queries with one to three relevant documents of grades 1 to 3, neighbours sharing some, and none to two
    negatives."""
    plain = word_collection(documents=12, queries=10)
    queries = []
    for i, query in enumerate(plain.queries):
        positives = {f"d{(i + k) % 12}": 1 + (i + k) % 3 for k in range(1 + i % 3)}
        negatives = tuple(f"d{(i + 5 + k) % 12}" for k in range(i % 3))
        queries.append(dataclasses.replace(query, positives=positives, negatives=negatives))
    return dataclasses.replace(plain, queries=tuple(queries))


def batch_of(collection: Collection) -> PairBatch:
    pipeline = PairPipeline(
        mixture=Mixture(collections=(collection,), seed=1),
        prompter=Prompter(byte_tokenizer(embed_token=True)),
        global_batch=8,
        encode_chunk=4,
        max_query_tokens=16,
        max_document_tokens=32,
        negatives=2,
    )
    return pipeline.batch(2)


@pytest.mark.parametrize(
    ("directions", "partition"),
    [(ALL[:1], "joint"), (TWO, "joint"), (ALL, "joint"), (ALL[:1], "per_direction"), (TWO, "per_direction")],
)
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.slow
def test_losses_of_a_batch_by_hand(
    directions: tuple[Direction, ...], partition: str, margin: float | None
) -> None:
    collection = graded_collection()
    batch = batch_of(collection)
    B, P = len(batch.known_ids), len(batch.document_ids)
    queries, documents = unit_rows(B, 16, 0), unit_rows(P, 16, 1)
    # The same document has the same vector, wherever it stands.
    documents = documents[[list(batch.document_ids).index(number) for number in batch.document_ids]]
    config = SftConfig(
        directions=directions, partition="joint" if partition == "joint" else "per_direction", negatives=2
    )
    config = dataclasses.replace(config, false_negative_margin=margin)
    infonce, triplet, _ = contrastive_losses(jnp.asarray(queries), jnp.asarray(documents), batch, config)

    # What each row stands for, read from the judgements alone.
    relevance, excluded, own = np.zeros((B, P)), np.zeros((B, P), bool), np.zeros((B, P), bool)
    for b in range(B):
        known = dict(zip(batch.known_ids[b].tolist(), batch.known_relevance[b].tolist(), strict=True))
        for p, number in enumerate(batch.document_ids.tolist()):
            relevance[b, p] = known.get(number, 0.0) if number >= 0 else 0.0
            excluded[b, p] = number < 0
            own[b, p] = p in batch.mined[b].tolist()
    # There are missing negatives, and documents that stand in more than one row.
    assert -1 in batch.document_ids
    assert len(set(batch.document_ids.tolist())) < P
    in_double = torch.tensor(queries, dtype=torch.float64), torch.tensor(documents, dtype=torch.float64)
    total, count = info_nce_by_hand(*in_double, relevance, excluded, 0.05, directions, partition, own, margin)
    assert float(infonce) == pytest.approx(float(total) / count, rel=1e-5)
    total, count, _ = triplet_by_hand(*in_double, relevance, excluded, 0.15, batch.mined, np.ones(B, bool))
    assert float(triplet) == pytest.approx(float(total) / count, rel=1e-5)
