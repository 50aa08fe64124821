"""An index in shards finds what one index over everything finds, in one process and in two."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_bucket import fake_bucket
from helpers.index_versions import FIELDS, publish, unit
from helpers.jax_processes import run_processes

from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.protocol import Index, hash_of_ids
from search_r3_jax.retrieval.index.scann import scann_available
from search_r3_jax.retrieval.store.sharded import (
    Shard,
    ShardedIndex,
    merge_top_k,
    open_shard,
    publish_shard,
    shard_root,
    shard_rows,
)
from search_r3_jax.retrieval.store.versions import IndexVersionError, PublishOptions, current_version

needs_scann = pytest.mark.skipif(not scann_available(), reason="scann has wheels for Linux only")
KINDS = ["exact", pytest.param("scann", marks=needs_scann)]
PROGRAM = Path(__file__).parents[2] / "helpers" / "sharded_index.py"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_shards_find_what_one_index_finds(tmp_path: Path, kind: str, processes: int) -> None:
    reports = run_processes(PROGRAM, [str(tmp_path), kind], processes=processes, devices=2, timeout=200)
    for process, report in enumerate(reports):
        assert report["processes"] == processes
        assert report["facts"] == [kind, 5, [203, 24], True]
        assert all(report["rows"])
        assert max(report["scores"]) <= 1e-6
        refused = report["refused"]
        assert "overlap or leave a gap at 0" in refused["late"]
        assert refused["row"] == "IndexError: rows 0 to 203: want 0 to 202"
        assert "IndexVersionError" in refused["rows"]
        assert ("vectors.npy: does not match" if process == processes - 1 else "another process") in refused[
            "damaged"
        ]
        if processes == 2:
            assert "version differs: [5, 6]" in refused["version"]
            assert "width differs: [24, 23]" in refused["width"]
            assert "overlap or leave a gap at 10" in refused["overlap"]
            assert "overlap or leave a gap at 102" in refused["gap"]
            assert "different corpora" in refused["corpus"]


@pytest.mark.parametrize("seed", range(20))
def test_merged_results_are_those_of_a_stable_sort(seed: int) -> None:
    generator = np.random.default_rng(seed)
    P, Q, per, k = (int(generator.integers(1, high)) for high in (6, 4, 9, 25))
    # Few different scores: many ties within a shard and across shards.
    scores = generator.integers(4, size=(P, Q, per)).astype(np.float32)
    rows = np.arange(P * per, dtype=np.int32).reshape(P, 1, per).repeat(Q, axis=1)
    kept = min(k, per)
    order = np.argsort(-scores, axis=2, kind="stable")[:, :, :kept]
    padding = ((0, 0), (0, 0), (0, k - kept))
    found_scores = np.pad(np.take_along_axis(scores, order, axis=2), padding, constant_values=-np.inf)
    found_rows = np.pad(np.take_along_axis(rows, order, axis=2), padding, constant_values=-1)
    # Shards in any order, as the devices may be.
    shuffled = generator.permutation(P)
    merged_scores, merged_rows = merge_top_k(found_scores[shuffled], found_rows[shuffled], k)
    for query in range(Q):
        ranked = sorted(
            (-score, row)
            for score, row in zip(scores[:, query].ravel().tolist(), range(P * per), strict=True)
        )[:k]
        missing = k - len(ranked)
        assert merged_rows[query].tolist() == [row for _, row in ranked] + [-1] * missing
        assert merged_scores[query].tolist() == [-score for score, _ in ranked] + [-np.inf] * missing
    assert (merged_scores.dtype, merged_rows.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (7, 3), (8, 4), (100, 7), (5, 5)])
def test_the_rows_of_all_processes_are_the_corpus(rows: int, processes: int) -> None:
    ranges = [shard_rows(rows, process, processes) for process in range(processes)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="want a row for each"):
        shard_rows(rows, processes, processes)
    with pytest.raises(ValueError, match="want a row for each"):
        shard_rows(rows, 0, rows + 1)


def test_one_process_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3_jax.retrieval.store.sharded.multihost_utils", None)
    vectors, ids = unit(30), [str(row) for row in range(30)]
    local = build_index("exact", vectors, ids, 3)
    index: Index = ShardedIndex(local, start=0, ids_hash=local.ids_hash)
    for ours, theirs in zip(
        index.search(unit(4, seed=1), 40), local.search(unit(4, seed=1), 40), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(index.take(np.array([4, 2, 29])), vectors[[4, 2, 29]])


def test_a_shard_says_which_rows_it_holds(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "step": 5,
        "manifest_fields": FIELDS,
        "options": PublishOptions(kind="exact"),
    }
    first = Shard(process=0, processes=2, corpus_rows=41, ids_hash=hash_of_ids(["whole"]))
    ids = [f"d{row}" for row in range(21)]
    info = publish_shard(tmp_path, first, vectors=unit(21), ids=ids, **fields)
    assert (info.manifest["first_row"], info.manifest["corpus_rows"], info.manifest["rows"]) == (0, 41, 21)
    assert current_version(shard_root(tmp_path, 0, 2)) == 5
    with pytest.raises(ValueError, match="21 vectors: shard 1 of 2 of 41 rows has 20"):
        publish_shard(tmp_path, dataclasses.replace(first, process=1), vectors=unit(21), ids=ids, **fields)
    with pytest.raises(IndexVersionError, match="corpus_rows"):
        publish_shard(
            tmp_path, dataclasses.replace(first, corpus_rows=42), vectors=unit(21), ids=ids, **fields
        )
    # In one process, the shard of one: there is none, or a version that is no shard.
    with pytest.raises(IndexVersionError, match="no such index version"):
        open_shard(tmp_path, 5, corpus_rows=41)
    publish(Path(shard_root(tmp_path, 0, 1)))
    with pytest.raises(IndexVersionError, match="first_row is None, expected 0"):
        open_shard(tmp_path, 5, corpus_rows=200)


def test_a_shard_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    vectors, ids = unit(50), [f"d{row}" for row in range(50)]
    with fake_bucket():
        publish_shard(
            "gs://bucket/index",
            Shard(process=0, processes=1, corpus_rows=50, ids_hash=hash_of_ids(ids)),
            step=5,
            vectors=vectors,
            ids=ids,
            manifest_fields=FIELDS,
            options=PublishOptions(kind="exact"),
        )
        index = open_shard("gs://bucket/index", 5, corpus_rows=50, cache=tmp_path)
    np.testing.assert_array_equal(index.take(np.arange(50)), vectors)
    assert (tmp_path / "v5" / "vectors.npy").exists()
