"""An index in parts, each a ScaNN index over its share of the rows; a search merges the results of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from search_r3_jax.retrieval.index.protocol import check_corpus, check_queries, hash_of_ids
from search_r3_jax.retrieval.index.scann import ScannIndex


class PartsIndex:
    """ScaNN indices over consecutive rows of unit vectors [N,E]; implements `LocalIndex`.

    A process may hold some of the parts only; a search then finds documents of these.
    """

    kind: str = "scann"

    def __init__(
        self,
        parts: Sequence[tuple[int, ScannIndex]],
        vectors: np.ndarray,
        ids: Sequence[str],
        version: int,
        *,
        digest: str = "",
    ) -> None:
        """`parts` are the first row of each part held here, and its index; `vectors` and `ids` are of all.

        `digest` identifies the files of the version.
        """
        check_corpus(vectors, ids)
        self.vectors, self.ids, self.version = vectors, ids, version
        self.ids_hash, self.digest = hash_of_ids(ids), digest
        self._parts = parts

    @property
    def shape(self) -> tuple[int, int]:
        """(N, E)."""
        return (len(self.vectors), self.vectors.shape[1])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        Ties between parts by ascending row; −inf and −1 past the last document.
        """
        queries = check_queries(queries, k, self.vectors.shape[1])
        scores_pqk = np.full((len(self._parts) + 1, len(queries), k), -np.inf, np.float32)
        rows_pqk = np.full(scores_pqk.shape, -1, np.int32)
        for i, (start, part) in enumerate(self._parts):
            scores_pqk[i], rows = part.search(queries, k)
            rows_pqk[i] = np.where(rows >= 0, rows + start, -1)
        return merge_top_k(scores_pqk, rows_pqk, k)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        return np.asarray(self.vectors[rows], dtype=np.float32)


def merge_top_k(scores_pqk: np.ndarray, rows_pqk: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the results [P,Q,k] of P parts into the first k.

    Scores [Q,k] descending, ties by ascending row, score −inf and row −1 last.
    """
    P, Q, K = scores_pqk.shape
    scores = scores_pqk.transpose(1, 0, 2).reshape(Q, P * K)
    rows = rows_pqk.transpose(1, 0, 2).reshape(Q, P * K)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def part_ranges(rows: int, parts: int) -> list[tuple[int, int]]:
    """The rows [start, stop) of each of at most `parts` parts; sizes differ by one at most, none is empty."""
    each, more = divmod(rows, min(parts, rows))
    starts = [part * each + min(part, more) for part in range(min(parts, rows) + 1)]
    return list(pairwise(starts))
