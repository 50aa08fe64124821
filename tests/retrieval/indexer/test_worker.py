"""The indexer beyond one process and one folder: shared encoding, versions in a bucket, several trainers, its
threads and devices."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_bucket import fake_bucket
from helpers.index_versions import publish
from helpers.stage2_run import SOURCES, IndexedRun, until

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.snapshot_reader import pinned_snapshots, snapshot_steps
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat, read_beat
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.indexer.worker import IndexWorker, run_indexer
from search_r3_jax.retrieval.store.versions import current_version, list_versions, open_version


@pytest.fixture
def run(tiny_folders: dict[str, Path], tmp_path: Path) -> IndexedRun:
    made = IndexedRun(tmp_path, tiny_folders["llama"])
    made.save(0)
    return made


def worker_of(run: IndexedRun, process: int = 0, processes: int = 1) -> IndexWorker:
    return IndexWorker(
        run.path, run.config, run.record, Heartbeat(run.path, process), process=process, processes=processes
    )


@pytest.mark.slow
def test_two_processes_share_the_encoding(run: IndexedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3_jax.retrieval.indexer.worker.SHARD_DOCUMENTS", 8)
    monkeypatch.setattr("search_r3_jax.retrieval.indexer.worker.RETRY_SECONDS", 0.05)
    first, second = worker_of(run, 0, 2), worker_of(run, 1, 2)
    assert not second.advance()
    encoded: list[int] = []
    encode = second.encoder.encode
    monkeypatch.setattr(
        second.encoder, "encode", lambda *a, **n: encoded.append(len(a[1])) or encode(*a, **n)
    )
    done = threading.Event()

    def help_out() -> None:
        while not done.is_set():
            second.advance()

    helper = threading.Thread(target=help_out)
    helper.start()
    try:
        assert first.advance()
        run.save(2)
        assert first.advance()
    finally:
        done.set()
        helper.join()
    # Of five shards the second and the fourth, of either checkpoint.
    assert encoded == [8, 8, 8, 8]
    assert list_versions(index_folder(run.path)) == [2]
    index = open_version(index_folder(run.path), 2)
    np.testing.assert_allclose(index.vectors, run.vectors(2), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_an_index_is_built_from_snapshots_alone(
    tiny_folders: dict[str, Path], tmp_path: Path, rank: int, dtype: Any
) -> None:
    run = IndexedRun(tmp_path, tiny_folders["llama"], rank=rank, compute_dtype=dtype)
    run.save(0, 2)
    (run.path / "checkpoints").rename(run.path / "not-checkpoints")
    assert worker_of(run).advance()
    index = open_version(index_folder(run.path), 2, expect_corpus_hash=run.corpus_hash)
    # To the last bit what the trainer's own encoder makes of its float32 parameters.
    np.testing.assert_array_equal(index.vectors, run.vectors(2))


def test_a_snapshot_is_pinned_until_all_is_encoded(run: IndexedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be about to read it, and the trainer saves the next ones meanwhile."""
    worker = worker_of(run)
    encode = worker.encoder.encode
    kept = list[tuple[list[int], list[int]]]()

    def saving(*arguments: Any, **named: Any) -> np.ndarray:
        if not kept:
            run.save(2)
        kept.append((pinned_snapshots(run.path), snapshot_steps(run.path)))
        return encode(*arguments, **named)

    monkeypatch.setattr(worker.encoder, "encode", saving)
    assert worker.advance()
    # The documents, then the probes.
    assert kept == [([0], [0, 2]), ([], [0, 2])]
    assert worker.advance()
    assert pinned_snapshots(run.path) == []
    run.save(4)
    assert snapshot_steps(run.path) == [4]


def test_the_scoring_that_reads_the_snapshot_of_the_index_keeps_it(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    run = IndexedRun(tmp_path, tiny_folders["llama"], scoring="consistent_stale")
    worker = worker_of(run)
    for step in (0, 2):
        run.save(step)
        assert worker.advance()
        run.save(step + 1)
        assert step in snapshot_steps(run.path)


def test_what_an_earlier_release_encoded_from_float32_is_encoded_again_or_left(run: IndexedRun) -> None:
    worker = worker_of(run)
    record = run.path / "encoding" / "0" / "corpus.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"model_hash": "of float32"}')
    (record.parent / "shard-00000.npy").write_bytes(b"")
    assert worker.advance()
    np.testing.assert_allclose(open_version(index_folder(run.path), 0).vectors, run.vectors(0), atol=1e-5)
    run.save(2)
    publish(index_folder(run.path), 2)
    (index_folder(run.path) / "CURRENT").write_text("0\n")
    assert worker.advance()
    beat = read_beat(run.path)
    assert beat is not None
    assert (beat.phase, beat.step) == ("refused", 2)
    assert "is there already, of other parameters, and stays" in beat.message
    run.save(4)
    assert worker.advance()
    assert current_version(index_folder(run.path)) == 4


def test_a_process_that_there_is_not_is_refused(run: IndexedRun) -> None:
    with pytest.raises(UserError, match="--process: 2 of 2: give 0 to 1"):
        run_indexer(run.path, process=2, processes=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_versions_in_a_bucket(
    tiny_folders: dict[str, Path], tmp_path: Path, dtype: str, log_lines: list[str]
) -> None:
    run = IndexedRun(tmp_path, tiny_folders["llama"], folder="gs://bucket/index", vector_dtype=dtype)
    run.save(0)
    with fake_bucket():
        worker = worker_of(run)
        assert worker.advance()
        follower = IndexFollower(
            run.path,
            run.corpus_hash,
            run.model.embed_id,
            settings=dataclasses.replace(run.config.index, local=False),
        )
        follower.start()
        try:
            assert until(lambda: follower.newer_than(None, at_most=9)).version == 0
            run.save(2)
            assert worker.advance()
            index = until(lambda: follower.newer_than(0, at_most=9))
            assert follower.version_stats(2)["recall@10"] == 1
        finally:
            follower.close()
        assert current_version("gs://bucket/index") == 2
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(index.take(np.arange(40)), run.vectors(2), atol=tolerance)
    assert [line.split(":")[0] for line in log_lines] == ["index v0", "index v2"]
    assert not (run.path / "index").exists()


@pytest.mark.slow
def test_threads_and_cores_are_what_the_config_says(run: IndexedRun) -> None:
    cores = sorted(os.sched_getaffinity(0))[:1]
    program = (
        "import os, sys, jax; from search_r3_jax.config import IndexConfig\n"
        "from search_r3_jax.retrieval.indexer.resources import limit_resources\n"
        f"limit_resources(IndexConfig(nice=3, threads=1, cores={tuple(cores)!r}))\n"
        "before = len(os.listdir('/proc/self/task')); jax.numpy.zeros(9).block_until_ready()\n"
        "print(sorted(os.sched_getaffinity(0)), os.nice(0), len(os.listdir('/proc/self/task')) - before)"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown, nice, threads = done.stdout.strip().rsplit(" ", 2)
    assert json.loads(shown) == cores
    assert int(nice) >= 3
    without = subprocess.run(
        [
            sys.executable,
            "-c",
            program.replace("threads=1", "threads=6").replace(f"cores={tuple(cores)!r}", "cores=()"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert int(without.stdout.split()[-1]) > int(threads)


def test_cores_that_there_are_not_are_refused(run: IndexedRun) -> None:
    # In this very process, whose priority is not to change.
    config = dataclasses.replace(run.config, index=IndexConfig(cores=(4096,), nice=0))
    record = {**run.record, "config": dataclasses.asdict(config)}
    (run.path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"index\.cores"):
        run_indexer(run.path)
