"""Fewer queries, and a smaller corpus, that are the same for every system, and what tells two sets of texts
apart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from search_r3_jax.data.collection import Collection
from search_r3_jax.files import digest_of


@dataclass(frozen=True, kw_only=True)
class CorpusSample:
    """Which part of a corpus was searched.

    Attributes:
        asked: how many documents were wanted; more remain where more are judged.
        documents: how many remain, of `whole`.
        judged: how many of them the split's queries judge.
        seed: draws the others.
        ids_sha256: hash of the remaining ids, whatever their order.
    """

    asked: int
    documents: int
    whole: int
    judged: int
    seed: int
    ids_sha256: str


@dataclass(frozen=True, kw_only=True)
class QuerySample:
    """Which of a split's queries were searched: `queries` of `whole`, drawn with `seed`."""

    queries: int
    whole: int
    seed: int


def sample_queries(
    collection: Collection, max_queries: int, *, seed: int = 0
) -> tuple[Collection, QuerySample]:
    """At most so many queries, in their order; chosen by a hash of their ids, and a larger number holds the
    smaller one's."""
    drawn = sorted(
        (query.query_id for query in collection.queries),
        key=lambda query_id: digest_of((str(seed), query_id)),
    )
    kept = set(drawn[:max_queries])
    queries = tuple(query for query in collection.queries if query.query_id in kept)
    return dataclasses.replace(collection, queries=queries), QuerySample(
        queries=len(queries), whole=len(collection.queries), seed=seed
    )


def sample_corpus(
    collection: Collection, max_documents: int, *, seed: int = 0
) -> tuple[Collection, CorpusSample]:
    """All documents that the queries judge, and others up to `max_documents`; chosen by a hash of their ids,
    not by their order."""
    judged = {doc_id for query in collection.queries for doc_id in (*query.positives, *query.negatives)}
    others = [document.doc_id for document in collection.documents if document.doc_id not in judged]
    drawn = sorted(others, key=lambda doc_id: digest_of((str(seed), doc_id)))[
        : max(0, max_documents - len(judged))
    ]
    kept = judged.union(drawn)
    documents = tuple(document for document in collection.documents if document.doc_id in kept)
    cut = CorpusSample(
        asked=max_documents,
        documents=len(documents),
        whole=len(collection.documents),
        judged=len(judged),
        seed=seed,
        ids_sha256=digest_of(sorted(document.doc_id for document in documents)),
    )
    return dataclasses.replace(collection, documents=documents), cut


def unordered_documents_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids and bodies of the corpus, whatever its order."""
    return digest_of(sorted(digest_of((document.doc_id, document.body)) for document in collection.documents))


def unordered_queries_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids, texts and relevant documents of the queries, whatever their order."""
    parts = [
        digest_of(
            (
                query.query_id,
                query.text,
                *(f"{doc_id} {score}" for doc_id, score in sorted(query.positives.items())),
            )
        )
        for query in collection.queries
    ]
    return digest_of(sorted(part for part in parts))
