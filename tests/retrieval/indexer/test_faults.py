"""What can befall the index while training goes on: it keeps the index it has, the next one is right, the log
says what happened."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stage2_run import IndexedRun, until

from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps
from search_r3_jax.hub.snapshot_reader import (
    latest_snapshot,
    pin_snapshots,
    pinned_snapshots,
    snapshot_steps,
)
from search_r3_jax.retrieval.environment.environment import Environment
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer import publishing
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.heartbeat import Beat, Heartbeat, only_indexer, read_beat, watch_indexer
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.indexer.supervisor import IndexerProcess
from search_r3_jax.retrieval.indexer.worker import IndexWorker
from search_r3_jax.retrieval.store import manifest as version_files
from search_r3_jax.retrieval.store import versions
from search_r3_jax.retrieval.store.versions import current_version, list_versions, open_version


@pytest.fixture
def run(tiny_folders: dict[str, Path], tmp_path: Path) -> IndexedRun:
    made = IndexedRun(tmp_path, tiny_folders["llama"])
    made.save(0)
    return made


def worker_of(run: IndexedRun) -> IndexWorker:
    return IndexWorker(run.path, run.config, run.record, Heartbeat(run.path))


def opened(run: IndexedRun, step: int) -> Index:
    return open_version(
        index_folder(run.path),
        step,
        expect_corpus_hash=run.corpus_hash,
        expect_embed_token_id=run.model.embed_id,
    )


def check_vectors(run: IndexedRun, index: Index) -> None:
    """What an index holds is what its checkpoint's parameters say."""
    expected = run.vectors(index.version)
    np.testing.assert_allclose(index.take(np.arange(len(expected))), expected, atol=1e-5)


class Training:
    """Steps of the environment, one after another, by whatever index there is."""

    def __init__(self, run: IndexedRun, index: Index):
        self._current, self.steps = run.vectors(1), 0
        self._environment = Environment(
            index, lambda rows: self._current[rows], candidates=8, overlay_max_age_steps=0
        )

    def step(self) -> None:
        vectors = self._current[:6].reshape(2, 3, -1)
        result = self._environment.score(self.steps, [{0: 1.0}, {3: 1.0}], vectors, np.ones((2, 3), bool))
        assert np.isfinite(result.rewards).all()
        self.steps += 1


@contextmanager
def following(follower: IndexFollower) -> Iterator[IndexFollower]:
    follower.start()
    try:
        yield follower
    finally:
        follower.close()


# A process each, killed or hit while it makes version 2; version 0 is in use.
FAULTS = {
    "killed while encoding": "ended with status -9",
    "killed between shards": "ended with status -9",
    "killed while building": "ended with status -9",
    "killed before the rename": "ended with status -9",
    "killed before the pointer": "ended with status -9",
    "disk full while publishing": "No space left on device",
    "disk full at the pointer": "No space left on device",
    "silent": "has been silent",
    "clocks jump": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_and_the_next_version_is_right(
    run: IndexedRun,
    fault: str,
    log_lines: list[str],
) -> None:
    worker_of(run).build(0)
    run.save(2)
    # A start takes longer than that, and beats meanwhile.
    with following(run.follower(fault, silent_seconds=15 if fault == "silent" else 600)) as follower:
        first = until(lambda: follower.newer_than(None, at_most=9))
        assert first.version == 0
        training = Training(run, first)
        second = until(
            lambda: follower.newer_than(0, at_most=9), seconds=120, meanwhile=[training.step, follower.check]
        )
    assert training.steps > 0
    assert second.version == 2
    check_vectors(run, second)
    assert FAULTS[fault] in " ".join(log_lines)
    if fault != "clocks jump":
        assert (run.path / "fault-met").read_text() == fault
    assert list_versions(index_folder(run.path)) in ([0, 2], [2])
    left = [path.name for path in index_folder(run.path).iterdir() if path.name.startswith(".tmp-v")]
    assert not left
    assert not (run.path / "encoding" / "2").exists()


@pytest.mark.slow
def test_a_snapshot_deleted_under_the_reader_is_left_for_the_newest(run: IndexedRun) -> None:
    pin_snapshots(run.path, "someone", [2])
    run.save(2, 4)
    with following(run.follower("snapshot deleted")) as follower:
        index = until(lambda: follower.newer_than(None, at_most=9), seconds=120, meanwhile=[follower.check])
    assert latest_snapshot(run.path) == 2
    assert index.version == 2
    check_vectors(run, index)
    assert "snapshot 4 was deleted while it was read" in run.log()
    assert pinned_snapshots(run.path) == [2]


@pytest.mark.slow
def test_a_second_indexer_leaves_the_run_to_the_first(
    run: IndexedRun,
    log_lines: list[str],
) -> None:
    with following(run.follower()) as follower:
        until(lambda: follower.newer_than(None, at_most=9), seconds=120)
        command = [sys.executable, "-m", "search_r3_jax", "indexer", "--run", str(run.path)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        beat = read_beat(run.path)
        assert beat is not None
        assert f"another indexer follows this run (process {beat.pid} on " in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        with following(run.follower()) as other:
            assert until(lambda: other.newer_than(None, at_most=9)).version == 0
            other.check()
        assert "another indexer follows this run" in log_lines[0]
        # It was not the second trainer's to end.
        os.kill(beat.pid, 0)


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; from search_r3_jax.retrieval.indexer.heartbeat import "
        "only_indexer\n"
        f"with only_indexer(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert watch_indexer(tmp_path).holder() is not None
    with pytest.raises(UserError, match=r"indexer\.lock: another indexer"), only_indexer(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert watch_indexer(tmp_path).holder() is None


def damage(path: Path, how: str) -> None:
    file = path / ("MANIFEST.json" if how in ("corpus", "token") else "vectors.npy")
    content = file.read_bytes()
    if how == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "gone":
        file.unlink()
    else:
        manifest = json.loads(content)
        manifest["corpus_hash" if how == "corpus" else "embed_token_id"] = "other" if how == "corpus" else 3
        manifest.pop("manifest_sha256")
        manifest["manifest_sha256"] = version_files.manifest_hash(manifest)
        file.write_text(json.dumps(manifest))


HOW = [
    "flipped",
    "token",
    *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "gone", "corpus")),
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.slow
def test_a_version_that_is_damaged_or_of_something_else_is_never_used_and_made_anew(
    run: IndexedRun, how: str, log_lines: list[str]
) -> None:
    worker = worker_of(run)
    assert worker.advance()
    run.save(2)
    assert worker.advance()
    with following(run.follower(local=False)) as follower:
        assert until(lambda: follower.newer_than(None, at_most=9)).version == 2
        run.save(4)
        # The follower must not be faster than the damage.
        with follower._lock:
            assert worker.advance()
            damage(Path(index_folder(run.path)) / "v4", how)
        until(lambda: (index_folder(run.path) / "REFUSED").exists() or None)
        assert follower.newer_than(2, at_most=9) is None
        assert any("keeping the index in use" in line for line in log_lines)
        # The indexer hears of it.
        assert worker.advance()
        mended = until(lambda: follower.newer_than(2, at_most=9))
        assert mended.version == 4
        check_vectors(run, mended)


@pytest.mark.parametrize("how", HOW)
def test_an_indexer_that_starts_looks_at_the_current_version_first(
    run: IndexedRun, how: str, log_lines: list[str]
) -> None:
    worker_of(run).build(0)
    damage(Path(index_folder(run.path)) / "v0", how)
    worker = worker_of(run)
    assert any("making it anew" in line for line in log_lines)
    assert worker.advance()
    check_vectors(run, opened(run, 0))
    assert not worker.advance()


def test_what_is_refused_again_and_again_is_given_up(run: IndexedRun) -> None:
    worker = worker_of(run)
    worker.build(0)
    for _ in range(publishing.MAX_REMAKES):
        (index_folder(run.path) / "REFUSED").write_text("0\n")
        assert worker.advance()
        assert list_versions(index_folder(run.path)) == [0]
    (index_folder(run.path) / "REFUSED").write_text("0\n")
    assert not worker.advance()
    beat = read_beat(run.path)
    assert beat is not None
    assert beat.phase == "refused"
    assert "was refused 3 times" in beat.message
    run.save(2)
    assert worker.advance()
    check_vectors(run, opened(run, 2))


def test_an_index_under_the_gate_is_not_published_and_the_next_checkpoint_is_tried(
    run: IndexedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(run)
    worker.build(0)
    run.save(2)
    with monkeypatch.context() as patched:
        patched.setattr(versions, "probe_recall", lambda *_: 0.5)
        assert worker.advance()
        assert not worker.advance()
    beat = read_beat(run.path)
    assert beat is not None
    assert (beat.phase, beat.step) == ("refused", 2)
    assert "under the gate" in beat.message
    assert current_version(index_folder(run.path)) == 0
    run.save(4)
    assert worker.advance()
    assert current_version(index_folder(run.path)) == 4


def test_a_pinned_snapshot_is_not_deleted_nor_the_newest(run: IndexedRun) -> None:
    pin_snapshots(run.path, "someone", [0])
    run.save(2, 4, 6, keep=1)
    assert snapshot_steps(run.path) == [0, 6]
    # Who reads the snapshot needs no checkpoint.
    assert checkpoint_steps(run.path) == [6]
    pin_snapshots(run.path, "someone", [])
    run.save(8, keep=1)
    assert snapshot_steps(run.path) == checkpoint_steps(run.path) == [8]


def test_the_newest_checkpoint_is_taken_and_interrupted_encoding_goes_on(
    run: IndexedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_r3_jax.retrieval.indexer.worker.SHARD_DOCUMENTS", 16)
    run.save(2, 4)
    worker = worker_of(run)
    calls: list[int] = []
    encode = worker.encoder.encode

    def counted(state: Any, texts: Any, **named: Any) -> np.ndarray:
        if len(calls) == 1:
            calls.append(-1)
            raise KeyboardInterrupt
        calls.append(len(texts))
        return encode(state, texts, **named)

    monkeypatch.setattr(worker.encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        worker.advance()
    assert worker.advance()
    assert list_versions(index_folder(run.path)) == [4]
    # Every document once, then the probes.
    assert calls == [16, -1, 16, 8, len(worker._collection.queries)]
    check_vectors(run, opened(run, 4))


def test_an_error_in_the_background_is_raised_where_training_goes_on(
    run: IndexedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    worker_of(run).build(0)
    monkeypatch.setattr("search_r3_jax.retrieval.indexer.follower.open_version", broken)
    with (
        following(run.follower(local=False)) as follower,
        pytest.raises(ZeroDivisionError, match="a bug"),
    ):
        until(lambda: follower.newer_than(None, at_most=9), meanwhile=[follower.check])


class TestSupervisor:
    """With a process that is no indexer."""

    def start(self, run: Path, program: str, **settings: Any) -> IndexerProcess:
        process = IndexerProcess(
            run,
            **({"local": True, "silent_seconds": 60} | settings),
            command=[sys.executable, "-c", program],
        )
        process.start()
        return process

    def test_restarts_with_pauses_that_grow_and_tells_why(self, tmp_path: Path, log_lines: list[str]) -> None:
        process = self.start(tmp_path, "print('no way'); raise SystemExit(7)")
        until(lambda: len(log_lines) >= 3 or None, meanwhile=[process.check])
        assert [
            f"in {pause} s: no way" in line for pause, line in zip((1, 2, 4), log_lines, strict=False)
        ] == [True] * 3
        assert "ended with status 7" in log_lines[0]

    def test_who_can_only_wait_is_told_when_it_is_in_vain(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("search_r3_jax.retrieval.indexer.supervisor.LONGEST_PAUSE", 0.01)
        process = self.start(tmp_path, "raise SystemExit('no corpus')")
        process.raise_if_failing()

        def hopeless() -> str | None:
            process.check()
            try:
                process.raise_if_failing()
            except UserError as error:
                return str(error)
            return None

        assert "indexer.log: the indexer ended 6 times in a row: no corpus" in until(hopeless)
        process.succeeded()
        process.raise_if_failing()

    def test_a_refused_checkpoint_ends_the_wait(self, tmp_path: Path) -> None:
        process = self.start(tmp_path, "import time; time.sleep(60)", local=False)
        heartbeat = Heartbeat(tmp_path)
        heartbeat.beat("refused", step=0, message="recall too low")
        process.check()
        with pytest.raises(UserError, match="no index to go on with: recall too low"):
            process.raise_if_failing()
        # One that has come since is not tried yet.
        snapshot = tmp_path / "snapshots" / "4"
        snapshot.mkdir(parents=True)
        process.raise_if_failing()
        heartbeat.beat("refused", step=4, message="recall too low again")
        process.check()
        with pytest.raises(UserError, match="no index to go on with: recall too low again"):
            process.raise_if_failing()

    def test_a_failure_is_told_while_there_is_nothing_to_do(self, tmp_path: Path) -> None:
        heartbeat = Heartbeat(tmp_path)
        heartbeat.waiting(3)
        found = read_beat(tmp_path)
        assert found is not None
        assert (found.phase, found.step) == ("waiting", 3)
        heartbeat.beat("refused", step=4, message="recall too low")
        heartbeat.waiting(4)
        again = read_beat(tmp_path)
        assert again is not None
        assert (again.phase, again.step, again.message) == ("refused", 4, "recall too low")
        # So it is not taken for dead.
        assert again.beat == found.beat + 2

    def test_silence_elsewhere_is_told_once(self, tmp_path: Path, log_lines: list[str]) -> None:
        process = self.start(tmp_path, "", local=False, silent_seconds=0.2)
        until(lambda: log_lines or None, meanwhile=[process.check])
        process.check()
        assert len(log_lines) == 1
        assert "which runs elsewhere, has been silent" in log_lines[0]

    def test_a_half_written_heartbeat_is_none(self, tmp_path: Path) -> None:
        assert read_beat(tmp_path) is None
        (tmp_path / "indexer.json").write_text('{"beat": 3')
        assert read_beat(tmp_path) is None
        Heartbeat(tmp_path).beat("encoding", step=4, encoded=2, documents=9)
        found = read_beat(tmp_path)
        assert found is not None
        assert dataclasses.replace(found, time=0) == Beat(
            beat=1, pid=os.getpid(), phase="encoding", step=4, encoded=2, documents=9
        )
