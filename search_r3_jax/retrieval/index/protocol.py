"""The protocol of an index over document vectors, and its recall against another."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from search_r3_jax.files import digest_of

IndexKind = Literal["exact", "scann", "device", "auto"]


class Index(Protocol):
    """An immutable index over unit vectors [N,E], searched by row."""

    @property
    def kind(self) -> str:
        """The kind of search: `exact`, `scann` or `device`."""
        ...

    @property
    def version(self) -> int:
        """The checkpoint step whose parameters encoded the vectors."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """The number of vectors and their dimension, (N, E)."""
        ...

    @property
    def ids_hash(self) -> str:
        """`hash_of_ids` of the documents: equal hashes, equal rows."""
        ...

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        −inf and −1 past the last document.
        """
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        ...


class LocalIndex(Index, Protocol):
    """An index whose vectors are all in this process; row i of `vectors` belongs to document `ids[i]`."""

    @property
    def ids(self) -> Sequence[str]:
        """Document ids by row, N of them."""
        ...

    @property
    def vectors(self) -> np.ndarray:
        """Unit vectors [N,E], float32 or bfloat16, possibly memory-mapped."""
        ...


def hash_of_ids(ids: Sequence[str]) -> str:
    """Hexadecimal sha256 over document ids in order."""
    return digest_of(ids)


def recall_at_k(found_rows: np.ndarray, exact_rows: np.ndarray, k: int) -> float:
    """Share of the true first k rows [Q,≥k] among the first k retrieved [Q,≥k].

    −1 is no row; 1.0 where there are no true rows.
    """
    returned, exact = found_rows[:, :k], exact_rows[:, :k]
    hits = ((exact[:, :, None] == returned[:, None, :]).any(axis=2) & (exact >= 0)).sum()
    wanted = (exact >= 0).sum()
    return float(hits / wanted) if wanted else 1.0


def probe_recall(index: Index, exact: Index, queries: np.ndarray, k: int) -> float:
    """Recall@k of `index` for queries [Q,E] against exact search.

    A document that ties with the true k-th counts as correct, so copies do not lower the recall.
    """
    exact_scores, exact_rows = exact.search(queries, k)
    found_rows = np.sort(index.search(queries, k)[1], axis=1)
    found_vectors = exact.take(np.maximum(found_rows, 0).ravel()).reshape(*found_rows.shape, -1)
    counted = (found_rows >= 0) & (np.diff(found_rows, axis=1, prepend=-1) != 0)
    found_scores = np.where(counted, np.einsum("qe,qke->qk", queries, found_vectors), -np.inf)
    wanted = (exact_rows >= 0).sum(axis=1)
    last = np.where(exact_rows >= 0, exact_scores, np.inf).min(axis=1, keepdims=True)
    # Tolerance for the order of summation of the same float32 products.
    slack = 1e-6
    above = (found_scores > last + slack).sum(axis=1)
    tied = (np.abs(found_scores - last) <= slack).sum(axis=1)
    open_to_ties = wanted - (exact_scores > last + slack).sum(axis=1)
    return float((above + np.minimum(tied, open_to_ties)).sum() / max(wanted.sum(), 1))


def check_corpus(vectors: np.ndarray, ids: Sequence[str]) -> None:
    """Raise ValueError unless `vectors` is [N,E] with N ≥ 1 and one id a row."""
    if vectors.ndim != 2 or len(vectors) == 0 or len(vectors) != len(ids):
        raise ValueError(f"vectors {vectors.shape} and {len(ids)} ids: want [N,E], N ≥ 1, and one id a row")


def check_queries(queries: np.ndarray, k: int, dim: int) -> np.ndarray:
    """Queries [Q,E] as contiguous float32; raises ValueError on another width or k < 1."""
    if queries.ndim != 2 or queries.shape[1] != dim or k < 1:
        raise ValueError(f"queries {queries.shape}, k {k}: want [Q,{dim}] and k ≥ 1")
    return np.ascontiguousarray(queries, dtype=np.float32)


def pad_results(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Widen results [Q,≤k] to [Q,k] with score −inf and row −1; float32 and int32."""
    missing = ((0, 0), (0, k - scores.shape[1]))
    padded_scores = np.pad(scores.astype(np.float32), missing, constant_values=-np.inf)
    return padded_scores, np.pad(rows.astype(np.int32), missing, constant_values=-1)
