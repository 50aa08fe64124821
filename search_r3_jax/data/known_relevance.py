"""Documents known to be relevant, over texts instead of ids: queries of one text, documents of one body."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.corpus_facts import DIGEST_BYTES
from search_r3_jax.text.words import as_read


def first_copies(collections: Sequence[Collection]) -> np.ndarray:
    """For each document [N] int64: the number of the first one with the same body, its own mostly.

    Documents are numbered through all collections. Bodies are compared as prompts hold them (`as_read`).
    """
    digests = np.concatenate([collection.facts.digests for collection in collections])
    keys = np.ascontiguousarray(digests).view(np.dtype((np.void, DIGEST_BYTES)))[:, 0]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.ravel()].astype(np.int64)


def known_documents(
    collections: Sequence[Collection], first_copy: np.ndarray
) -> list[tuple[dict[int, int], ...]]:
    """Each query's known documents, of each collection: number of a first copy → highest grade.

    Documents are numbered through all collections, as in `first_copy`. A query's own come first, then those
    of the other queries with the same body.
    """
    starts = np.cumsum([0, *(len(collection.documents) for collection in collections)]).tolist()
    own = [
        [
            _best_grades(
                (int(first_copy[start + collection.row_of[doc_id]]), grade)
                for doc_id, grade in query.positives.items()
                # Judgements may name documents that are not there.
                if doc_id in collection.row_of
            )
            for query in collection.queries
        ]
        for collection, start in zip(collections, starts, strict=False)
    ]
    of_body: dict[str, list[tuple[int, int]]] = {}
    for collection, grades in zip(collections, own, strict=True):
        for query, each in zip(collection.queries, grades, strict=True):
            of_body.setdefault(as_read(query.body), []).extend(each.items())
    return [
        tuple(
            _best_grades([*each.items(), *of_body[as_read(query.body)]])
            for query, each in zip(collection.queries, grades, strict=True)
        )
        for collection, grades in zip(collections, own, strict=True)
    ]


def known_rows(collection: Collection) -> tuple[dict[int, int], ...]:
    """Each query's known documents: row → grade, copies included."""
    first_copy = first_copies([collection])
    copied = np.flatnonzero(first_copy != np.arange(len(first_copy)))
    copies: dict[int, list[int]] = {}
    for row in copied.tolist():
        copies.setdefault(int(first_copy[row]), []).append(row)
    return tuple(
        {copy: grade for row, grade in grades.items() for copy in (row, *copies.get(row, ()))}
        for grades in known_documents([collection], first_copy)[0]
    )


def _best_grades(graded: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The highest grade of each document, in order of first appearance."""
    best: dict[int, int] = {}
    for number, grade in graded:
        best[number] = max(grade, best.get(number, 0))
    return best
