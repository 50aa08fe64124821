"""Exact search: a float32 matrix product and top-k in JAX, in pieces of bounded size."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.retrieval.index.protocol import check_corpus, check_queries, hash_of_ids, pad_results


class ExactIndex:
    """Exact search over unit vectors [N,E]; implements `Index`.

    The vectors are float32 or bfloat16 and may be memory-mapped.
    """

    kind: str = "exact"

    def __init__(
        self,
        vectors: np.ndarray,
        ids: Sequence[str],
        version: int,
        *,
        corpus_chunk: int = 32_768,
        query_chunk: int = 1_024,
        approximate: bool = False,
    ) -> None:
        """Compute at most query_chunk × corpus_chunk scores at once.

        `approximate` uses `jax.lax.approx_max_k`, on TPU only.
        """
        check_corpus(vectors, ids)
        self.vectors = vectors
        self.ids = ids
        self.ids_hash = hash_of_ids(ids)
        self.version = version
        self._corpus_chunk = min(corpus_chunk, next_power_of_two(len(vectors)))
        self._query_chunk = query_chunk
        self._approximate = approximate
        # A corpus of one chunk stays on the device; a larger one is streamed at every search.
        self._resident = self._device_chunk(0) if len(vectors) <= self._corpus_chunk else None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        Ties by ascending row.
        """
        queries = check_queries(queries, k, self.vectors.shape[1])
        wanted = min(k, len(self.vectors))
        if len(queries) == 0:
            return pad_results(np.empty((0, wanted)), np.empty((0, wanted)), k)
        parts = [self._search_chunk(queries, start, chunk, wanted) for start, chunk in self._chunks()]
        scores = np.concatenate([scores for scores, _ in parts], axis=1)
        rows = np.concatenate([rows for _, rows in parts], axis=1)
        # The sort is stable and chunks are in row order: ties keep the lower row first.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        return pad_results(
            np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1), k
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, E)."""
        return (len(self.vectors), self.vectors.shape[1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        return np.asarray(self.vectors[rows], dtype=np.float32)

    def _chunks(self) -> Iterator[tuple[int, jax.Array]]:
        for start in range(0, len(self.vectors), self._corpus_chunk):
            yield start, self._device_chunk(start) if self._resident is None else self._resident

    def _device_chunk(self, start: int) -> jax.Array:
        chunk = np.asarray(self.vectors[start : start + self._corpus_chunk], dtype=np.float32)
        return jnp.asarray(np.pad(chunk, ((0, self._corpus_chunk - len(chunk)), (0, 0))))

    def _search_chunk(
        self, queries: np.ndarray, start: int, chunk: jax.Array, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        live = min(self._corpus_chunk, len(self.vectors) - start)
        scores, rows = [], []
        for first in range(0, len(queries), self._query_chunk):
            block = queries[first : first + self._query_chunk]
            # Buckets of powers of two: one compilation a bucket, not one for each number of queries.
            padded = np.pad(block, ((0, next_power_of_two(len(block)) - len(block)), (0, 0)))
            block_scores, block_rows = _top_k(
                padded, chunk, live, k=min(k, self._corpus_chunk), approximate=self._approximate
            )
            scores.append(np.asarray(block_scores)[: len(block)])
            rows.append(np.asarray(block_rows)[: len(block)] + start)
        return np.concatenate(scores), np.concatenate(rows)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n ≥ 1)."""
    return 1 << (n - 1).bit_length()


@partial(jax.jit, static_argnames=("k", "approximate"))
def _top_k(
    queries_qe: jax.Array, corpus_ne: jax.Array, live: int, *, k: int, approximate: bool
) -> tuple[jax.Array, jax.Array]:
    scores_qn = jnp.einsum("qe,ne->qn", queries_qe, corpus_ne, precision=jax.lax.Precision.HIGHEST)
    scores_qn = jnp.where(jnp.arange(corpus_ne.shape[0]) < live, scores_qn, -jnp.inf)
    if approximate:
        return jax.lax.approx_max_k(scores_qn, k)
    return jax.lax.top_k(scores_qn, k)
