"""Reproducible subsamples of queries and corpus, and hashes that ignore their order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from search_r3_jax.data.collection import Collection
from search_r3_jax.files import digest_of


@dataclass(frozen=True, kw_only=True)
class CorpusSample:
    """Which part of a corpus was searched.

    Attributes:
        asked: requested number of documents; more remain if more are judged.
        documents: number of documents that remain, of `whole`.
        judged: how many of these the split's queries judge.
        seed: seed of the draw of the others.
        ids_sha256: hash of the sorted remaining ids.
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
    """At most `max_queries` queries in their order, drawn by a hash of their ids.

    A larger sample of the same seed contains the smaller one.
    """
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
    """All documents that the queries judge, plus others up to `max_documents`, drawn by a hash of their ids.

    The order of the documents does not change the draw, nor do judgements of documents that are not there.
    """
    named = {doc_id for query in collection.queries for doc_id in (*query.positives, *query.negatives)}
    ids = collection.document_ids
    judged = named.intersection(ids)
    others = [doc_id for doc_id in ids if doc_id not in judged]
    drawn = sorted(others, key=lambda doc_id: digest_of((str(seed), doc_id)))[
        : max(0, max_documents - len(judged))
    ]
    kept = judged.union(drawn)
    documents = collection.documents_at([row for row, doc_id in enumerate(ids) if doc_id in kept])
    sample = CorpusSample(
        asked=max_documents,
        documents=len(documents),
        whole=len(collection.documents),
        judged=len(judged),
        seed=seed,
        ids_sha256=digest_of(sorted(document.doc_id for document in documents)),
    )
    return dataclasses.replace(collection, documents=documents), sample


def unordered_documents_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids and bodies of the corpus; their order does not matter."""
    return digest_of(sorted(digest_of((document.doc_id, document.body)) for document in collection.documents))


def unordered_queries_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids, texts, instructions and judgements of queries; not over their order."""
    parts = [
        digest_of(
            (
                query.query_id,
                query.text,
                *([query.instruction] if query.instruction else []),
                *(f"{doc_id} {score}" for doc_id, score in sorted(query.positives.items())),
            )
        )
        for query in collection.queries
    ]
    return digest_of(sorted(part for part in parts))
