"""Chooses the documents that the auxiliary InfoNCE contrasts the sampled queries with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest

import numpy as np


def drop_near_duplicates(
    vectors_of: Callable[[np.ndarray], np.ndarray],
    positives: Sequence[Mapping[int, float]],
    candidates: Sequence[np.ndarray],
    *,
    max_cosine: float,
) -> list[np.ndarray]:
    """Each query's candidates, int32, without near duplicates of a positive of any query of the step.

    The cosine of a near duplicate to the best positive of a query exceeds `max_cosine`: probably an unjudged
    copy of it. Judged documents stay. `vectors_of` gives unit vectors [n,E] of rows [n].
    """
    judged = [row for grades in positives for row in grades]
    best_qe = vectors_of(np.array(best_rows(positives), np.int32))
    # Taken at once: each time costs a round trip.
    vectors = np.split(
        vectors_of(np.concatenate(candidates)), np.cumsum([len(rows) for rows in candidates])[:-1]
    )
    kept = []
    for rows, own in zip(candidates, vectors, strict=True):
        duplicate = (own @ best_qe.T).max(axis=1) > max_cosine
        kept.append(rows[~duplicate | np.isin(rows, judged)])
    return kept


def infonce_document_rows(
    positives: Sequence[Mapping[int, float]], candidates: Sequence[np.ndarray], negatives: int, *, rows: int
) -> np.ndarray:
    """Rows [Q+negatives] int32: each query's best relevant document, then candidates.

    Candidates are taken rank by rank over all queries. Where there are too few, rows 0, 1, … of the corpus
    (`rows` in all) fill up. Raises ValueError where the corpus has too few.
    """
    best = best_rows(positives)
    ranked = (
        row
        for rank in zip_longest(*(each.tolist() for each in candidates))
        for row in rank
        if row is not None
    )
    distinct = len(set(best))
    others = islice(_distinct(chain(best, ranked, range(rows))), distinct, distinct + negatives)
    chosen = np.array([*best, *others], np.int32)
    if len(chosen) < len(best) + negatives:
        raise ValueError(
            f"a corpus of {rows} documents has no {negatives} beside those of {len(best)} queries"
        )
    return chosen


def _distinct(rows: Iterable[int]) -> Iterator[int]:
    """Each row once, in order of first appearance; reads no further than it is asked."""
    seen = set[int]()
    for row in rows:
        if row not in seen:
            seen.add(row)
            yield row


def best_rows(positives: Sequence[Mapping[int, float]]) -> list[int]:
    """Each query's row of the highest grade; the first of a tie."""
    return [max(grades, key=lambda row: (grades[row], -row)) for grades in positives]
