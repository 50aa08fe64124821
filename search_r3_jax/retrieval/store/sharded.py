"""An index in shards, one in each JAX process; a search combines the results of all.

Every process passes the same queries, searches its rows, and gets the complete answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from search_r3_jax.retrieval.index.exact import next_power_of_two
from search_r3_jax.retrieval.index.protocol import LocalIndex, check_queries
from search_r3_jax.retrieval.store.manifest import IndexVersionError
from search_r3_jax.retrieval.store.versions import (
    PublishOptions,
    VersionInfo,
    open_version,
    publish_version,
    read_version,
)


class ShardedIndex:
    """An index whose rows [start, stop) are split over the processes; implements `Index`.

    All processes must call each method together.
    """

    def __init__(self, local: LocalIndex, *, start: int, ids_hash: str) -> None:
        """`local` holds the rows from `start` on; `ids_hash` is `hash_of_ids` of the whole corpus.

        Raises ValueError in all processes when they hold different versions, widths or corpora, or when their
        rows overlap or leave a gap.
        """
        self.kind: str = local.kind
        self.version = local.version
        self.ids_hash = ids_hash
        self._local, self._start = local, start
        rows, dim = local.shape
        facts = _gather(np.array([start, start + rows, dim, local.version], np.int32))
        hashes = _gather(np.frombuffer(bytes.fromhex(ids_hash), np.uint8))
        self._ranges = [(int(first), int(stop)) for first, stop in facts[:, :2]]
        # Not the process's number: the gathered arrays follow the order of devices, which may differ.
        self._place = self._ranges.index((start, start + rows))
        problem = _problem_of(self._ranges)
        for name, values in (("version", facts[:, 3]), ("width", facts[:, 2])):
            if len(set(values.tolist())) > 1:
                problem = f"{name} differs: {values.tolist()}"
        if len({bytes(each) for each in hashes}) > 1:
            problem = "ids of different corpora"
        if problem:
            raise ValueError(f"shards of processes 0 to {len(facts) - 1} are no index: {problem}")
        self.shape: tuple[int, int] = (max(stop for _, stop in self._ranges), dim)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        The queries are the same in all processes. Ties by ascending row; −inf and −1 past the last document.
        """
        queries = check_queries(queries, k, self.shape[1])
        scores, rows = self._local.search(queries, k)
        rows = np.where(rows >= 0, rows + self._start, -1).astype(np.int32)
        return merge_top_k(_gather_rows(scores), _gather_rows(rows), k)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order.

        The rows are the same in all processes. Raises IndexError on a row that does not exist.
        """
        rows = np.asarray(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]:
            raise IndexError(f"rows {rows.min()} to {rows.max()}: want 0 to {self.shape[0] - 1}")
        places = [np.flatnonzero((rows >= first) & (rows < stop)) for first, stop in self._ranges]
        # Each process sends only the requested rows that it holds.
        most = max(len(at) for at in places)
        mine = np.zeros((most, self.shape[1]), np.float32)
        held_here = places[self._place]
        mine[: len(held_here)] = self._local.take(rows[held_here] - self._start)
        vectors = np.zeros((len(rows), self.shape[1]), np.float32)
        for at, gathered in zip(places, _gather_rows(mine), strict=True):
            vectors[at] = gathered[: len(at)]
        return vectors


def merge_top_k(scores_pqk: np.ndarray, rows_pqk: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the results [P,Q,k] of P shards into the first k.

    Scores [Q,k] descending, ties by ascending row, score −inf and row −1 last.
    """
    P, Q, K = scores_pqk.shape
    scores = scores_pqk.transpose(1, 0, 2).reshape(Q, P * K)
    rows = rows_pqk.transpose(1, 0, 2).reshape(Q, P * K)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def shard_rows(rows: int, process: int, processes: int) -> tuple[int, int]:
    """The rows [start, stop) of a corpus that one of several processes holds.

    Sizes differ by one at most. Raises ValueError for an empty shard.
    """
    if not 0 <= process < processes <= rows:
        raise ValueError(
            f"{rows} rows, process {process} of {processes}: want a row for each, and a process that is one "
            "of them"
        )
    each, more = divmod(rows, processes)
    start = process * each + min(process, more)
    return start, start + each + (process < more)


def shard_root(root: epath.PathLike, process: int, processes: int) -> epath.Path:
    """The folder of the versions of one process's shard."""
    return epath.Path(root) / f"shard-{process:05d}-of-{processes:05d}"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The rows of a corpus that one of several processes holds.

    Attributes:
        corpus_rows: documents of the whole corpus.
        ids_hash: `hash_of_ids` of the whole corpus.
    """

    process: int
    processes: int
    corpus_rows: int
    ids_hash: str


def publish_shard(
    root: epath.PathLike,
    shard: Shard,
    *,
    step: int,
    vectors: np.ndarray,
    ids: Sequence[str],
    manifest_fields: Mapping[str, Any],
    options: PublishOptions | None = None,
) -> VersionInfo:
    """`publish_version` of a shard under its `shard_root`.

    Raises ValueError when `vectors` [n,E] are not as many as the shard's rows, and what `publish_version`
    raises.
    """
    start, stop = shard_rows(shard.corpus_rows, shard.process, shard.processes)
    if len(vectors) != stop - start:
        raise ValueError(
            f"{len(vectors)} vectors: shard {shard.process} of {shard.processes} of {shard.corpus_rows} rows "
            f"has {stop - start}"
        )
    shard_fields = {
        "first_row": start,
        "corpus_rows": shard.corpus_rows,
        "corpus_ids_hash": shard.ids_hash,
    }
    return publish_version(
        shard_root(root, shard.process, shard.processes),
        step=step,
        vectors=vectors,
        ids=ids,
        manifest_fields={**manifest_fields, **shard_fields},
        options=options,
    )


def open_shard(
    root: epath.PathLike,
    step: int,
    *,
    corpus_rows: int,
    expect_corpus_hash: str | None = None,
    expect_embed_token_id: int | None = None,
    threads: int = 0,
    cache: Path | None = None,
) -> ShardedIndex:
    """Open the index of all processes, each with its shard of `v<step>`; all call it together.

    Raises IndexVersionError in all processes where `open_version` does in one, as for the shard of other
    rows, and ValueError where `ShardedIndex` does.
    """
    process, processes = jax.process_index(), jax.process_count()
    own_root = shard_root(root, process, processes)
    start, _ = shard_rows(corpus_rows, process, processes)
    opened: LocalIndex | None = None
    ids_hash, doubt = (
        "",
        IndexVersionError(f"{epath.Path(root)}: another process cannot open its shard of v{step}"),
    )
    try:
        ids_hash = str(read_version(own_root, step).manifest.get("corpus_ids_hash"))
        opened = open_version(
            own_root,
            step,
            expect_corpus_hash=expect_corpus_hash,
            expect_embed_token_id=expect_embed_token_id,
            expect={"first_row": start, "corpus_rows": corpus_rows},
            threads=threads,
            cache=cache,
        )
    except IndexVersionError as error:
        doubt = error
    # All raise together: if one process raised alone, the others would wait for it.
    if not _gather(np.array(opened is not None)).all() or opened is None:
        raise doubt
    return ShardedIndex(opened, start=start, ids_hash=ids_hash)


def _problem_of(ranges: Sequence[tuple[int, int]]) -> str | None:
    """Why ranges of rows do not make up a corpus; empty if they do."""
    reached = 0
    for start, stop in sorted(ranges):
        if start != reached:
            return f"rows {list(ranges)} overlap or leave a gap at {reached}"
        reached = stop
    return None


def _gather(array: np.ndarray) -> np.ndarray:
    """The arrays [...] of all processes as [P, ...]."""
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def _gather_rows(array: np.ndarray) -> np.ndarray:
    """`_gather` of arrays [n, ...]; a compilation for each power of two, not for each n."""
    n = len(array)
    if n == 0:
        return np.zeros((jax.process_count(), *array.shape), array.dtype)
    missing = next_power_of_two(n) - n
    return _gather(np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))))[:, :n]
