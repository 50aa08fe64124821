"""Hard negatives: the nearest documents of each query that are not judged relevant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from search_r3_jax.data.collection import Collection, Document
from search_r3_jax.data.known_relevance import first_copies, known_documents
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.protocol import LocalIndex

Sampling = Literal["top", "random"]
# Size of the candidates' vectors that are scored again at once.
GATHERED_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """Which of a query's nearest documents become its negatives; raises UserError for an empty window.

    A rank is counted from 0 among the documents not judged for the query: the most similar one has rank 0.
    Known positives, judged negatives and copies of another document's text have no rank. Of the window
    `[first_rank, last_rank)` those are left out that score too close to the query's weakest positive, or
    above it: they may be relevant. (`mine_hard_negatives` of sentence-transformers has the same limits, but
    counts `range_min` among what they leave.)

    Attributes:
        num_negatives: the most negatives added to a query.
        first_rank: the first rank of the window.
        last_rank: where the window ends; by default behind `num_negatives` ranks, ten times as many where a
            limit or chance chooses.
        max_score: the highest cosine of a negative with its query.
        margin: a negative's cosine is at least so far below the weakest positive's.
        relative_margin: the same, as a share of the weakest positive's cosine.
        sampling: `top` takes the first ranks that are left, `random` any, drawn from `seed` and the query's
            id alone.
        seed: of the drawing.
    """

    num_negatives: int = 4
    first_rank: int = 0
    last_rank: int | None = None
    max_score: float | None = None
    margin: float | None = None
    relative_margin: float | None = None
    sampling: Sampling = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UserError(f"--num-negatives: {self.num_negatives}: give 1 or more")
        if self.first_rank < 0:
            raise UserError(f"--first-rank: {self.first_rank}: give 0, the most similar document, or more")
        if self.end_rank <= self.first_rank:
            raise UserError(
                f"--last-rank: {self.end_rank}: the window is empty; give more than --first-rank "
                f"{self.first_rank}"
            )
        if self.window < self.num_negatives:
            raise UserError(
                f"--last-rank: {self.end_rank}: {self.window} ranks do not hold --num-negatives "
                f"{self.num_negatives}; widen the window"
            )
        for option, value, lowest, highest in (
            ("--max-score", self.max_score, -1.0, 1.0),
            ("--margin", self.margin, 0.0, 2.0),
            ("--relative-margin", self.relative_margin, 0.0, 1.0),
        ):
            if value is not None and not lowest <= value <= highest:
                raise UserError(f"{option}: {value}: give a number from {lowest:g} to {highest:g}")
        if self.sampling not in ("top", "random"):
            raise UserError(f"--sampling: {self.sampling!r}: give 'top' or 'random'")
        if self.seed < 0:
            raise UserError(f"--seed: {self.seed}: give 0 or more")

    @property
    def end_rank(self) -> int:
        """`last_rank`, or its default."""
        if self.last_rank is not None:
            return self.last_rank
        limited = any(limit is not None for limit in (self.max_score, self.margin, self.relative_margin))
        return self.first_rank + self.num_negatives * (10 if limited or self.sampling == "random" else 1)

    @property
    def window(self) -> int:
        """How many ranks there are to choose from."""
        return self.end_rank - self.first_rank


class Selection(NamedTuple):
    """Negatives of Q queries, and what was left out before the window's end.

    Attributes:
        rows: [Q,n] int32, most similar first, −1 filled.
        positives, judged, too_close: [Q] int64, how many candidates were known to be relevant, were negatives
            already, and may be relevant.
    """

    rows: np.ndarray
    positives: np.ndarray
    judged: np.ndarray
    too_close: np.ndarray


def select_negatives(
    scores_qk: np.ndarray,
    rows_qk: np.ndarray,
    *,
    positives: Sequence[np.ndarray],
    judged: Sequence[np.ndarray],
    weakest_q: np.ndarray,
    options: MiningOptions,
    draws_qw: np.ndarray | None = None,
) -> Selection:
    """Choose negatives from candidates [Q,K], sorted by descending score, row −1 for none.

    `positives` and `judged` hold each query's rows. `weakest_q` [Q] is the score of each query's weakest
    positive, +inf where there is none. `draws_qw` [Q,window] decides where the sampling is random: of the
    ranks that are left, those with the smallest draws.
    """
    positive_qk = _among(rows_qk, positives)
    judged_qk = _among(rows_qk, judged) & ~positive_qk
    ranked_qk = (rows_qk >= 0) & ~positive_qk & ~judged_qk
    rank_qk = np.cumsum(ranked_qk, axis=1) - ranked_qk
    before_end_qk = rank_qk < options.end_rank
    window_qk = ranked_qk & before_end_qk & (rank_qk >= options.first_rank)
    eligible_qk = window_qk & (scores_qk <= _highest_score(weakest_q, options)[:, None])
    order_qk: np.ndarray = rank_qk
    if draws_qw is not None:
        order_qk = np.take_along_axis(
            draws_qw, np.clip(rank_qk - options.first_rank, 0, options.window - 1), axis=1
        )
    chosen_qn = np.argsort(np.where(eligible_qk, order_qk, np.inf), axis=1, kind="stable")[
        :, : options.num_negatives
    ]
    # Back to the candidates' order, with ineligible ones last.
    chosen_qn = np.sort(
        np.where(np.take_along_axis(eligible_qk, chosen_qn, axis=1), chosen_qn, rows_qk.shape[1]), axis=1
    )
    padded_qk = np.pad(rows_qk, ((0, 0), (0, 1)), constant_values=-1)
    rows_qn = np.take_along_axis(padded_qk, chosen_qn, axis=1).astype(np.int32)
    missing = options.num_negatives - rows_qn.shape[1]
    return Selection(
        rows=np.pad(rows_qn, ((0, 0), (0, max(0, missing))), constant_values=-1),
        positives=(positive_qk & before_end_qk).sum(axis=1),
        judged=(judged_qk & before_end_qk).sum(axis=1),
        too_close=(window_qk & ~eligible_qk).sum(axis=1),
    )


def _among(rows_qk: np.ndarray, sets: Sequence[np.ndarray]) -> np.ndarray:
    """[Q,K] bool: whether a query's candidate is in the query's set."""
    member_qk = np.zeros(rows_qk.shape, bool)
    for q, rows in enumerate(sets):
        member_qk[q] = np.isin(rows_qk[q], rows)
    return member_qk


def _highest_score(weakest_q: np.ndarray, options: MiningOptions) -> np.ndarray:
    """The highest score [Q] that a negative may have."""
    highest_q = np.full(len(weakest_q), np.inf if options.max_score is None else options.max_score)
    if options.margin is not None:
        highest_q = np.minimum(highest_q, weakest_q - options.margin)
    if options.relative_margin is not None:
        # A share of the magnitude, because a share of a negative cosine would raise the limit.
        room_q = np.where(np.isfinite(weakest_q), np.abs(weakest_q), 0.0) * options.relative_margin
        highest_q = np.minimum(highest_q, weakest_q - room_q)
    return highest_q


class Texts(NamedTuple):
    """A collection's documents without copies, and its judgements as rows of those.

    Attributes:
        documents: the first document of every text, U of them.
        positives, judged: of each query the rows judged relevant and not; queries of one text share what is
            relevant to them.
    """

    documents: tuple[Document, ...]
    positives: list[np.ndarray]
    judged: list[np.ndarray]


def distinct_texts(collection: Collection) -> Texts:
    """The documents without copies, and the judgements as rows of those.

    Documents with the same body are copies: a copy of a positive is as relevant as the positive, and a
    negative is needed once. Queries are the same where text and instruction are.
    """
    first_copy = first_copies([collection])
    is_first = first_copy == np.arange(len(first_copy))
    # Of each document the row of its first copy among the documents kept.
    row = (np.cumsum(is_first) - 1)[first_copy]
    return Texts(
        documents=tuple(
            document for document, kept in zip(collection.documents, is_first, strict=True) if kept
        ),
        positives=[
            np.array(sorted(row[number] for number in grades), np.int64)
            for grades in known_documents([collection], first_copy)[0]
        ],
        judged=[
            # Judgements may name documents that are not there.
            np.array(
                sorted(
                    {
                        row[collection.row_of[doc_id]]
                        for doc_id in query.negatives
                        if doc_id in collection.row_of
                    }
                ),
                np.int64,
            )
            for query in collection.queries
        ],
    )


def _rows(row_of: Mapping[str, int], doc_ids: Iterable[str]) -> set[int]:
    return {row_of[doc_id] for doc_id in doc_ids if doc_id in row_of}


def mine_negatives(
    index: LocalIndex, queries_qe: np.ndarray, query_ids: Sequence[str], texts: Texts, options: MiningOptions
) -> Selection:
    """Negatives of queries [Q,E] from an index over `texts.documents`.

    Equal vectors give an equal result, in any order of the queries.
    """
    depths = np.array(
        [_depth(options, len(p) + len(j)) for p, j in zip(texts.positives, texts.judged, strict=True)],
        np.int64,
    )
    selections: list[tuple[np.ndarray, Selection]] = []
    for depth in np.unique(depths):
        at_depth = np.flatnonzero(depths == depth)
        K = min(int(depth), len(texts.documents))
        _, rows_qk = index.search(queries_qe[at_depth], K)
        chunk = max(1, GATHERED_BYTES // (8 * K * queries_qe.shape[1]))
        for start in range(0, len(at_depth), chunk):
            at = at_depth[start : start + chunk]
            selections.append(
                (
                    at,
                    _select(index, queries_qe, query_ids, texts, options, at, rows_qk[start : start + chunk]),
                )
            )
    place = np.argsort(np.concatenate([at for at, _ in selections]))
    return Selection(
        *(
            np.concatenate(parts)[place]
            for parts in zip(*(selection for _, selection in selections), strict=True)
        )
    )


def _select(
    index: LocalIndex,
    queries_qe: np.ndarray,
    query_ids: Sequence[str],
    texts: Texts,
    options: MiningOptions,
    at: np.ndarray,
    rows_qk: np.ndarray,
) -> Selection:
    scores_qk = _scores(index.vectors, queries_qe[at], rows_qk)
    # Sort again by these scores, ties by row.
    order = np.lexsort((rows_qk, -scores_qk), axis=1)
    scores_qk, rows_qk = (
        np.take_along_axis(scores_qk, order, axis=1),
        np.take_along_axis(rows_qk, order, axis=1),
    )
    positives = [texts.positives[q] for q in at]
    weakest_q = np.array(
        [_weakest(index.vectors, queries_qe[q], rows) for q, rows in zip(at, positives, strict=True)]
    )
    draws = (
        np.stack([_draws(options, query_ids[int(q)]) for q in at]) if options.sampling == "random" else None
    )
    return select_negatives(
        scores_qk,
        rows_qk,
        positives=positives,
        judged=[texts.judged[q] for q in at],
        weakest_q=weakest_q,
        options=options,
        draws_qw=draws,
    )


def _depth(options: MiningOptions, judged: int) -> int:
    """How many candidates are certain to hold the window.

    The number of judged candidates is rounded up to a power of two, because an index compiles for every
    depth.
    """
    return options.end_rank + (1 << (judged - 1).bit_length() if judged else 0)


def _scores(vectors_ne: np.ndarray, queries_qe: np.ndarray, rows_qk: np.ndarray) -> np.ndarray:
    """Cosines [Q,K] float64, −inf for row −1.

    Computed here, so that neither the index nor the number of threads decides which are above a limit.
    """
    candidates_qke = np.asarray(vectors_ne[np.maximum(rows_qk, 0)], np.float64)
    scores_qk = (candidates_qke @ queries_qe.astype(np.float64)[:, :, None])[:, :, 0]
    # Rounded, so that equal vectors tie in any order of summation.
    return np.where(rows_qk >= 0, np.round(scores_qk, 9), -np.inf)


def _weakest(vectors_ne: np.ndarray, query_e: np.ndarray, rows: np.ndarray) -> float:
    """The lowest cosine of a query with the documents relevant to it, +inf where there is none."""
    return float(_scores(vectors_ne, query_e[None], rows[None]).min(initial=np.inf))


def _draws(options: MiningOptions, query_id: str) -> np.ndarray:
    """Uniform draws [window] float64 in [0, 1) that depend only on seed and query."""
    words = np.frombuffer(hashlib.sha256(query_id.encode()).digest(), "<u4")
    return np.random.default_rng([options.seed, *words.tolist()]).random(options.window)
