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

import numpy as np
import pytest
from helpers.fake_bucket import fake_bucket
from helpers.stage2_run import SOURCES, IndexedRun, until

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat
from search_r3_jax.retrieval.indexer.worker import IndexWorker, index_folder, run_indexer
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


def test_a_process_that_there_is_not_is_refused(run: IndexedRun) -> None:
    with pytest.raises(UserError, match="--process: 2 of 2: give 0 to 1"):
        run_indexer(run.path, process=2, processes=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
