"""Exact search over vectors that stay on the devices: a scan in chunks, a top-k a device, and a merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from search_r3_jax.retrieval.index.exact import next_power_of_two
from search_r3_jax.retrieval.index.protocol import check_corpus, check_queries, hash_of_ids, pad_results

ROWS = "rows"
# A device computes at most QUERY_CHUNK × CHUNK_ROWS scores at once.
CHUNK_ROWS, QUERY_CHUNK = 65_536, 1_024
_BY_ROW, _WHOLE = PartitionSpec(ROWS), PartitionSpec()


class StoredVectors:
    """The vectors [N,E] of a `device` index that is not on devices yet: a `LocalIndex` without search."""

    kind: str = "device"

    def __init__(
        self, vectors: np.ndarray, ids: Sequence[str], version: int, *, recall: float, digest: str
    ) -> None:
        """`vectors` may be memory-mapped. `recall`: see `DeviceIndex`; `digest` identifies the version."""
        check_corpus(vectors, ids)
        self.vectors, self.ids, self.version = vectors, ids, version
        self.ids_hash, self.recall, self.digest = hash_of_ids(ids), recall, digest
        self.shape = (int(vectors.shape[0]), int(vectors.shape[1]))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Raise RuntimeError: `placed` gives the index that searches."""
        raise RuntimeError("the vectors are not on devices")

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        return np.asarray(self.vectors[rows], dtype=np.float32)

    def placed(self) -> DeviceIndex:
        """The index over these vectors on all devices; all processes call it together."""
        return DeviceIndex(self.vectors, self.ids, self.version, recall=self.recall)


class DeviceIndex:
    """Search over unit vectors [N,E] whose rows are spread over all devices; implements `LocalIndex`.

    Rows can be replaced in place (`put`). Of several processes each holds the rows of its devices, and all
    call each method together. `corpus` is the array on the devices, with padding; `vectors` stay those that
    the index was made of.
    """

    kind: str = "device"

    def __init__(
        self,
        vectors: np.ndarray,
        ids: Sequence[str],
        version: int,
        *,
        recall: float = 1.0,
        chunk_rows: int = CHUNK_ROWS,
        query_chunk: int = QUERY_CHUNK,
        devices: Sequence[Any] | None = None,
    ) -> None:
        """`vectors`, float32 or bfloat16, may be memory-mapped; they are read a device's rows at a time.

        `recall` is the least expected recall of a
        device's top-k: 1 is exact, less uses `jax.lax.approx_max_k`, which is faster on TPUs. `devices` are
        all by default. Each device computes at most query_chunk × chunk_rows scores at once.
        """
        check_corpus(vectors, ids)
        self.ids, self.ids_hash, self.version = ids, hash_of_ids(ids), version
        self.vectors, self.shape = vectors, (int(vectors.shape[0]), int(vectors.shape[1]))
        mesh = Mesh(np.array(devices or jax.devices()), (ROWS,), axis_types=(AxisType.Auto,))
        self._rows, chunk = _layout(self.shape[0], mesh.size, chunk_rows)
        self._query_chunk = query_chunk
        self._by_row, self._whole = NamedSharding(mesh, _BY_ROW), NamedSharding(mesh, _WHOLE)
        self.corpus = jax.make_array_from_callback(
            (self._rows, self.shape[1]), self._by_row, partial(_padded_rows, vectors, self._rows)
        )
        self._top_k = _top_k_over(mesh, rows=self.shape[0], chunk=chunk, recall=recall)
        self._encoded_at = np.full(self.shape[0], version, np.int64)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        Ties by ascending row; −inf and −1 past the last document.
        """
        queries = check_queries(queries, k, self.shape[1])
        wanted = min(k, self.shape[0])
        scores, rows = [np.zeros((0, wanted))], [np.zeros((0, wanted))]
        for first in range(0, len(queries), self._query_chunk):
            block = queries[first : first + self._query_chunk]
            # A program for each power of two, not for each number of queries.
            padded = np.pad(block, ((0, next_power_of_two(len(block)) - len(block)), (0, 0)))
            found = self._top_k(self._placed(padded), self.corpus, wanted)
            scores.append(np.asarray(found[0])[: len(block)])
            rows.append(np.asarray(found[1])[: len(block)])
        return pad_results(np.concatenate(scores), np.concatenate(rows), k)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], as they are on the devices, in their order.

        Raises IndexError on a row that does not exist.
        """
        rows = self._checked(rows)
        padded = np.pad(rows, (0, next_power_of_two(max(len(rows), 1)) - len(rows)))
        return np.asarray(_take(self.corpus, self._placed(padded), self._whole))[: len(rows)]

    def put(self, rows: np.ndarray, vectors: np.ndarray, steps: int | np.ndarray) -> None:
        """Replace the vectors of rows [n] by unit vectors [n,E], encoded with the parameters of `steps` [n].

        Raises ValueError on a row that is named twice, IndexError on one that does not exist.
        """
        rows = self._checked(rows)
        if vectors.shape != (len(rows), self.shape[1]) or len(set(rows.tolist())) != len(rows):
            raise ValueError(
                f"{len(rows)} rows, vectors {vectors.shape}: want [n,{self.shape[1]}], no row twice"
            )
        missing = next_power_of_two(max(len(rows), 1)) - len(rows)
        # Rows past the end are dropped.
        places = self._placed(np.pad(rows, (0, missing), constant_values=self._rows))
        values = self._placed(np.pad(np.asarray(vectors, np.float32), ((0, missing), (0, 0))))
        self.corpus = _put(self.corpus, places, values)
        self._encoded_at[rows] = steps

    @property
    def encoded_at(self) -> np.ndarray:
        """The step whose parameters encoded each row [N] int64."""
        return self._encoded_at

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int32)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]:
            raise IndexError(f"rows {rows.min()} to {rows.max()}: want 0 to {self.shape[0] - 1}")
        return rows

    def _placed(self, array: np.ndarray) -> jax.Array:
        """The same array on every device of every process."""
        return jax.make_array_from_callback(array.shape, self._whole, lambda index: array[index or ()])


def lower_search(
    devices: Sequence[Any], shape: tuple[int, int], dtype: jnp.dtype, *, queries: int, k: int, recall: float
) -> tuple[jax.stages.Lowered, jax.ShapeDtypeStruct]:
    """The program of `DeviceIndex.search` for `QUERY_CHUNK` queries at most, and the array of the corpus."""
    mesh = Mesh(np.array(devices), (ROWS,), axis_types=(AxisType.Auto,))
    padded, chunk = _layout(shape[0], mesh.size, CHUNK_ROWS)
    corpus = jax.ShapeDtypeStruct((padded, shape[1]), dtype, sharding=NamedSharding(mesh, _BY_ROW))
    asked = jax.ShapeDtypeStruct(
        (next_power_of_two(min(queries, QUERY_CHUNK)), shape[1]),
        jnp.float32,
        sharding=NamedSharding(mesh, _WHOLE),
    )
    search = _top_k_over(mesh, rows=shape[0], chunk=chunk, recall=recall)
    return search.lower(asked, corpus, min(k, shape[0])), corpus


def _layout(rows: int, devices: int, chunk_rows: int) -> tuple[int, int]:
    """Rows with padding, and those of a chunk: a device has whole chunks, and padding only in the last."""
    each = -(-rows // devices)
    chunks = -(-each // chunk_rows)
    chunk = -(-each // chunks)
    return devices * chunk * chunks, chunk


def _padded_rows(vectors: np.ndarray, rows: int, index: tuple[slice, ...] | None) -> np.ndarray:
    """The rows of one device, of `rows` in all; zero past the last document."""
    of_device = slice(None) if index is None else index[0]
    own = np.asarray(vectors[of_device])
    length = len(range(*of_device.indices(rows)))
    return np.pad(own, ((0, length - len(own)), (0, 0)))


@cache
def _top_k_over(mesh: Mesh, *, rows: int, chunk: int, recall: float) -> Any:
    """The search program of a corpus of `rows` documents spread over `mesh`, `chunk` rows at a time.

    One for all versions of a corpus: each would be compiled anew.
    """

    def of_chunk(scores_qc: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        k = min(k, chunk)
        if recall < 1:
            return jax.lax.approx_max_k(scores_qc, k, recall_target=recall)
        return jax.lax.top_k(scores_qc, k)

    def of_device(queries_qe: jax.Array, corpus_ne: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
        Q, own_rows = len(queries_qe), len(corpus_ne)
        first = jax.lax.axis_index(ROWS) * own_rows

        def body(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, None]:
            block_ce = jax.lax.dynamic_slice_in_dim(corpus_ne, start, chunk)
            # bfloat16 rows are multiplied as they are where the device does that; float32 ones exactly.
            precision = jax.lax.Precision.HIGHEST if corpus_ne.dtype == jnp.float32 else None
            scores_qc = jnp.einsum(
                "qe,ce->qc", queries_qe, block_ce, precision=precision, preferred_element_type=jnp.float32
            )
            numbers = first + start + jnp.arange(chunk, dtype=jnp.int32)
            scores_qc = jnp.where(numbers < rows, scores_qc, -jnp.inf)
            found, places = of_chunk(scores_qc, k)
            return _best(
                jnp.concatenate([best[0], found], axis=1),
                jnp.concatenate([best[1], numbers[places]], axis=1),
                k,
            ), None

        none = (jnp.full((Q, k), -jnp.inf, jnp.float32), jnp.full((Q, k), rows, jnp.int32))
        # The first results differ from device to device.
        none = jax.tree.map(lambda x: jax.lax.pcast(x, ROWS, to="varying"), none)
        starts = jnp.arange(0, own_rows, chunk, dtype=jnp.int32)
        scores_qk, rows_qk = jax.lax.scan(body, none, starts)[0]
        all_scores, all_rows = (jax.lax.all_gather(x, ROWS, axis=1, tiled=True) for x in (scores_qk, rows_qk))
        scores_qk, rows_qk = _best(all_scores, all_rows, k)
        return scores_qk, jnp.where(jnp.isneginf(scores_qk), -1, rows_qk)

    @partial(jax.jit, static_argnums=2)
    def search(queries_qe: jax.Array, corpus_ne: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        return jax.shard_map(
            partial(of_device, k=k),
            mesh=mesh,
            in_specs=(_WHOLE, _BY_ROW),
            out_specs=_WHOLE,
            # The gathered results are the same everywhere, which the types do not know.
            check_vma=False,
        )(queries_qe, corpus_ne)

    return search


def _best(scores_qm: jax.Array, rows_qm: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The first k by descending score; of equal scores the earlier columns, which hold lower rows."""
    scores_qk, places = jax.lax.top_k(scores_qm, k)
    return scores_qk, jnp.take_along_axis(rows_qm, places, axis=1)


@partial(jax.jit, static_argnums=2)
def _take(corpus_ne: jax.Array, rows_n: jax.Array, whole: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(corpus_ne[rows_n].astype(jnp.float32), whole)


@partial(jax.jit, donate_argnums=0)
def _put(corpus_ne: jax.Array, rows_n: jax.Array, vectors_ne: jax.Array) -> jax.Array:
    return corpus_ne.at[rows_n].set(vectors_ne.astype(corpus_ne.dtype), mode="drop")
