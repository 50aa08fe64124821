"""A program for tests: an index in shards, one a process, beside one index over everything; prints JSON.

Arguments: a folder, "exact" or "scann", process index, number of processes, port of the coordinator.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers.index_versions import FIELDS, unit

from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import hash_of_ids
from search_r3_jax.retrieval.store.sharded import (
    Shard,
    ShardedIndex,
    open_shard,
    publish_shard,
    shard_root,
    shard_rows,
)
from search_r3_jax.retrieval.store.versions import IndexVersionError, PublishOptions

# Odd: one shard has a row more.
N, E = 203, 24
VECTORS, IDS = unit(N, dim=E), [f"d{row}" for row in range(N)]
HASH = hash_of_ids(IDS)


def raised(make: Any) -> str:
    """The error that a call raises, in one line."""
    try:
        make()
    except (ValueError, IndexVersionError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: str, kind: Any, process: int, processes: int, port: int) -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    start, stop = shard_rows(N, process, processes)
    publish_shard(
        folder,
        Shard(process=process, processes=processes, corpus_rows=N, ids_hash=HASH),
        step=5,
        vectors=VECTORS[start:stop],
        ids=IDS[start:stop],
        manifest_fields=FIELDS,
        options=PublishOptions(kind=kind),
    )
    index = open_shard(folder, 5, corpus_rows=N, expect_corpus_hash="c", expect_embed_token_id=9)
    whole = ExactIndex(VECTORS, IDS, 5)
    report: dict[str, Any] = {
        "processes": jax.process_count(),
        "facts": [index.kind, index.version, list(index.shape), index.ids_hash == whole.ids_hash],
        "rows": [],
        "scores": [],
    }
    for queries, k in [(1, 5), (7, 20), (3, 150), (4, N), (2, N + 9), (0, 3)]:
        asked = unit(queries, seed=queries, dim=E)
        (scores, rows), (expected_scores, expected_rows) = index.search(asked, k), whole.search(asked, k)
        report["rows"].append(bool(np.array_equal(rows, expected_rows)))
        finite = np.isfinite(expected_scores)
        report["scores"].append(float(np.abs(scores[finite] - expected_scores[finite]).max(initial=0)))
        report["rows"].append(bool(np.array_equal(np.isfinite(scores), finite)))
        report["rows"].append((scores.dtype, rows.dtype) == (np.float32, np.int32))
    generator = np.random.default_rng(0)
    for wanted in [
        generator.permutation(N),
        generator.integers(N, size=37),
        np.array([N - 1, 0, N - 1]),
        np.array([1, 0]),
        np.zeros(0, int),
    ]:
        report["rows"].append(bool(np.array_equal(index.take(wanted), VECTORS[wanted])))

    local = build_index("exact", VECTORS[start:stop], IDS[start:stop], 5)
    another = build_index("exact", VECTORS[start:stop], IDS[start:stop], 5 + process)
    report["refused"] = {
        "version": raised(lambda: ShardedIndex(another, start=start, ids_hash=HASH)),
        "overlap": raised(lambda: ShardedIndex(local, start=0, ids_hash=HASH)),
        "gap": raised(lambda: ShardedIndex(local, start=start + process, ids_hash=HASH)),
        "late": raised(lambda: ShardedIndex(local, start=start + 1, ids_hash=HASH)),
        "corpus": raised(lambda: ShardedIndex(local, start=start, ids_hash=hash_of_ids([str(process)]))),
        "width": raised(
            lambda: ShardedIndex(
                ExactIndex(VECTORS[start:stop, : E - process], IDS[start:stop], 5), start=start, ids_hash=HASH
            )
        ),
        "row": raised(lambda: index.take(np.array([0, N]))),
        "rows": raised(lambda: open_shard(folder, 5, corpus_rows=N + 4)),
    }
    if process == processes - 1:
        (Path(shard_root(folder, process, processes)) / "v5" / "vectors.npy").write_bytes(b"")
    report["refused"]["damaged"] = raised(lambda: open_shard(folder, 5, corpus_rows=N))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:]))
