"""A program for tests: a `device` index over all devices of all processes beside exact search; prints JSON.

Arguments: process index, number of processes, port of the coordinator.
"""

import json
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
from helpers.index_versions import unit
from helpers.jax_processes import joined

from search_r3_jax.retrieval.index.device import DeviceIndex
from search_r3_jax.retrieval.index.exact import ExactIndex

# Neither a multiple of the devices nor of the chunks: the last rows of the last device are padding.
N, E = 1003, 24
IDS = [f"d{row}" for row in range(N)]


def differs(index: DeviceIndex, exact: ExactIndex) -> list[str]:
    """Searches in which the two do not find the same rows, or scores 1e-6 apart."""
    found: list[str] = []
    for queries, k in [(1, 5), (7, 20), (3, 900), (2, N + 9), (0, 3), (40, 10)]:
        asked = unit(queries, seed=queries, dim=E)
        (scores, rows), (exact_scores, exact_rows) = index.search(asked, k), exact.search(asked, k)
        same = np.allclose(scores, exact_scores, rtol=0, atol=1e-6) and (rows[:, :N] >= 0).all()
        # Two of which the scores differ by rounding may change places.
        of_rows = np.einsum("qe,qke->qk", asked, exact.take(rows.ravel()).reshape(*rows.shape, E))
        same &= np.allclose(of_rows[:, :N], exact_scores[:, :N], rtol=0, atol=1e-6)
        same &= all(len(set(each[:N].tolist())) == min(k, N) for each in rows)
        same &= np.array_equal(rows < 0, exact_rows < 0)
        if not same or (scores.dtype, rows.dtype) != (np.float32, np.int32):
            found.append(f"{queries} queries, k {k}")
    wanted = np.array([N - 1, 0, 57, 0, 1000])
    if not np.array_equal(index.take(wanted), exact.take(wanted)):
        found.append("take")
    return found


def main() -> None:
    report: dict[str, Any] = {"devices": jax.device_count()}
    vectors = unit(N, dim=E)
    # Equal scores on different devices, told apart by their rows.
    vectors[[400, 1001]] = vectors[3]
    for dtype in ("float32", "bfloat16"):
        stored = vectors if dtype == "float32" else vectors.astype(ml_dtypes.bfloat16)
        for chunk_rows in (8, 50, 65_536):
            index = DeviceIndex(stored, IDS, 5, chunk_rows=chunk_rows, query_chunk=16)
            report[f"{dtype} {chunk_rows}"] = differs(index, ExactIndex(stored, IDS, 5))
        copies = index.search(vectors[3:4], 3)[1]
        report[f"{dtype} copies"] = sorted(copies[0].tolist())
        # 5 rows in two calls, one of which replaces a row of the first.
        changed = stored.copy()
        for rows, step in (([1, 500, 1002], 7), ([500, 4], 9)):
            changed[rows] = unit(len(rows), seed=step, dim=E).astype(changed.dtype)
            index.put(np.array(rows), changed[rows], step)
        report[f"{dtype} put"] = differs(index, ExactIndex(changed, IDS, 5))
        report[f"{dtype} steps"] = [int(index.encoded_at[row]) for row in (0, 1, 500, 4, 1002)]
    report["rows held"] = sum(len(np.asarray(shard.data)) for shard in index.corpus.addressable_shards)
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main()
