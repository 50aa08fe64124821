"""Fewer queries, and a smaller corpus, that are the same for every system, and what tells two sets of texts
apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from search_r3_jax.data.collection import Collection


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
class QueryCut:
    """Which of a split's queries were searched: `queries` of `whole`, drawn with `seed`."""

    queries: int
    whole: int
    seed: int


def cut_queries(collection: Collection, max_queries: int, *, seed: int = 0) -> tuple[Collection, QueryCut]:
    """At most so many queries, in their order; chosen by a hash of their ids, and a larger number holds the
    smaller one's."""
    drawn = sorted(
        (query.query_id for query in collection.queries), key=lambda query_id: _digest((str(seed), query_id))
    )
    kept = set(drawn[:max_queries])
    queries = tuple(query for query in collection.queries if query.query_id in kept)
    return dataclasses.replace(collection, queries=queries), QueryCut(
        queries=len(queries), whole=len(collection.queries), seed=seed
    )


def cut_corpus(
    collection: Collection, max_documents: int, *, seed: int = 0
) -> tuple[Collection, CorpusSample]:
    """All documents that the queries judge, and others up to `max_documents`; chosen by a hash of their ids,
    not by their order."""
    judged = {doc_id for query in collection.queries for doc_id in (*query.positives, *query.negatives)}
    others = [document.doc_id for document in collection.documents if document.doc_id not in judged]
    drawn = sorted(others, key=lambda doc_id: _digest((str(seed), doc_id)))[
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
        ids_sha256=_digest(sorted(document.doc_id for document in documents)).hex(),
    )
    return dataclasses.replace(collection, documents=documents), cut


def documents_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids and bodies of the corpus, whatever its order."""
    return _digest(
        sorted(_digest((document.doc_id, document.body)).hex() for document in collection.documents)
    ).hex()


def queries_hash(collection: Collection) -> str:
    """Hexadecimal sha256 over ids, texts and relevant documents of the queries, whatever their order."""
    parts = [
        _digest(
            (
                query.query_id,
                query.text,
                *(f"{doc_id} {score}" for doc_id, score in sorted(query.positives.items())),
            )
        )
        for query in collection.queries
    ]
    return _digest(sorted(part.hex() for part in parts)).hex()


def _digest(fields: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for field in fields:
        encoded = field.encode()
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
