"""Versions whose corpus the trainer encodes: their vectors, whatever comes between, and whole runs of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import Place, computed, equal, until
from helpers.stepped_vectors import DIM, vectors_of
from helpers.tiny_models import word_collection

from search_r3_jax.config import IndexConfig, RunConfig
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import EmbeddingError, UserError
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.hub.snapshot_reader import pinned_snapshots
from search_r3_jax.retrieval.indexer.heartbeat import Heartbeat, read_beat
from search_r3_jax.retrieval.indexer.publishing import MAX_REMAKES, encoding_folder, index_folder
from search_r3_jax.retrieval.indexer.trainer_vectors import READY, TrainerVectorsPublisher
from search_r3_jax.retrieval.indexer.worker import run_indexer
from search_r3_jax.retrieval.store.versions import (
    current_version,
    list_versions,
    mark_rejected,
    open_version,
)
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import trainer_encoding
from search_r3_jax.training.index_state import IndexedCorpus
from search_r3_jax.training.trainer_encoding import SnapshotEncoder, TrainerEncoding

ROWS, A_STEP = 50, 7
COLLECTION = word_collection(documents=ROWS, queries=4)


class Subject:
    """A trainer that encodes vectors which are known, and its indexer; both may start again at any time."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any):
        self.run, self.encoded = run, list[tuple[int, int]]()
        index = IndexConfig(kind="exact", source="trainer", documents_per_step=A_STEP)
        self.config = RunConfig(index=dataclasses.replace(index, **settings))
        self.broken: int | None = None
        monkeypatch.setattr(trainer_encoding, "LOOK_SECONDS", 0.0)
        # Parameters are the number of their step.
        monkeypatch.setattr(trainer_encoding, "read_snapshot", lambda run, step, like: step)
        monkeypatch.setattr(trainer_encoding, "parameter_hash", lambda params: f"of {params}")
        self.start_trainer()
        self.start_indexer()

    def start_trainer(self) -> None:
        corpus = IndexedCorpus(
            config=self.config,
            collection=COLLECTION,
            encode=lambda rows: pytest.fail("nothing is encoded with the current parameters"),
            encode_with=self._encode_with,
            trainable=nnx.State({}),
            embed_id=3,
            dim=DIM,
        )
        self.trainer = TrainerEncoding(self.run, corpus, SnapshotEncoder(Team(), self.run, corpus))

    def start_indexer(self) -> None:
        self.indexer = TrainerVectorsPublisher(self.run, self.config, COLLECTION, Heartbeat(self.run))

    def snapshot(self, step: int) -> None:
        (self.run / "snapshots" / str(step)).mkdir(parents=True)

    def encode_all(self) -> int:
        return sum(1 for _ in iter(self.trainer.advance, False))

    def versions(self) -> list[int]:
        return list_versions(index_folder(self.run))

    def _encode_with(self, params: Any, rows: np.ndarray) -> np.ndarray:
        step = int(params)
        if step == self.broken:
            raise EmbeddingError("its vector is not finite")
        self.encoded += [(step, int(row)) for row in rows]
        return vectors_of(rows, step)


def check(subject: Subject, step: int) -> None:
    """The version holds each document under the parameters of its step."""
    wanted = vectors_of(np.arange(ROWS), step)
    if subject.config.index.vector_dtype == "bfloat16":
        wanted = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    root = index_folder(subject.run)
    index = open_version(root, step, expect_corpus_hash=COLLECTION.corpus_hash(), expect_embed_token_id=3)
    np.testing.assert_array_equal(index.take(np.arange(ROWS, dtype=np.int32)), wanted)


@pytest.mark.parametrize(("dtype", "seed"), [("float32", 0), ("float32", 1), ("bfloat16", 2)])
def test_versions_hold_their_steps_vectors_however_often_both_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    subject = Subject(tmp_path, monkeypatch, vector_dtype=dtype, keep_versions=9)
    seen: set[int] = set()
    for step in range(60):
        if step % 5 == 0:
            subject.snapshot(step)
        subject.trainer.advance()
        if generator.random() < 0.5:
            subject.indexer.advance()
        if generator.random() < 0.2:
            subject.start_trainer()
        if generator.random() < 0.2:
            subject.start_indexer()
        for version in subject.versions():
            if version not in seen:
                check(subject, version)
                seen.add(version)
    # Eight calls encode the corpus; a snapshot that came meanwhile is passed over for the newest.
    assert len(seen) >= 4
    # What is on disk is not encoded again.
    assert len(set(subject.encoded)) == len(subject.encoded)
    assert {row for step, row in subject.encoded if step == 0} == set(range(ROWS))


def test_a_snapshot_is_encoded_once_and_pinned_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(tmp_path, monkeypatch)
    assert not subject.trainer.advance()
    subject.snapshot(0)
    assert subject.trainer.advance()
    assert pinned_snapshots(tmp_path) == [0]
    assert subject.encode_all() == -(-ROWS // A_STEP) - 1
    assert not subject.trainer.advance()
    assert subject.indexer.advance()
    assert subject.versions() == [0]
    assert not list(encoding_folder(tmp_path).glob("*/"))
    assert not subject.trainer.advance()
    assert not subject.indexer.advance()
    assert len(subject.encoded) == ROWS


def test_what_an_indexer_leaves_when_it_is_killed_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(tmp_path, monkeypatch, keep_versions=9)
    subject.snapshot(0)
    subject.encode_all()
    folder = encoding_folder(tmp_path) / "0"
    shutil.copytree(folder, tmp_path / "copy")
    subject.indexer.advance()
    # After it had published: while it removed the vectors, and before. Their parameters are still there.
    shutil.copytree(tmp_path / "copy", folder.with_name("removed-0"))
    shutil.copytree(tmp_path / "copy", folder)
    subject.start_indexer()
    assert not folder.with_name("removed-0").exists()
    subject.indexer.advance()
    assert not folder.exists()
    # A release that removed them one by one left some.
    folder.mkdir()
    (folder / "shard-00000.npy").write_bytes(b"")
    subject.snapshot(5)
    subject.encode_all()
    subject.indexer.advance()
    assert subject.versions() == [0, 5]
    check(subject, 5)


def test_a_rejected_version_is_encoded_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(tmp_path, monkeypatch)
    subject.snapshot(4)
    for _ in range(MAX_REMAKES + 1):
        subject.encode_all()
        subject.indexer.advance()
        assert subject.versions() == [4]
        mark_rejected(index_folder(tmp_path), 4)
        subject.indexer.advance()
        assert subject.versions() == []
    subject.encode_all()
    assert not subject.indexer.advance()
    beat = read_beat(tmp_path)
    assert beat is not None
    assert beat.phase == "refused"
    assert "was refused 3 times" in beat.message
    # The vectors stay, so that they are not encoded again.
    assert not subject.trainer.advance()
    subject.snapshot(9)
    subject.encode_all()
    subject.indexer.advance()
    check(subject, 9)


def test_a_damaged_shard_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(tmp_path, monkeypatch)
    subject.snapshot(0)
    subject.encode_all()
    shard = encoding_folder(tmp_path) / "0" / "shard-00002.npy"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert subject.indexer.advance()
    assert subject.versions() == []
    subject.encode_all()
    subject.indexer.advance()
    check(subject, 0)
    again = list(range(2 * A_STEP, 3 * A_STEP))
    assert [row for _, row in subject.encoded] == [*range(ROWS), *again]


def test_vectors_of_other_parameters_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(tmp_path, monkeypatch)
    subject.snapshot(0)
    subject.trainer.advance()
    monkeypatch.setattr(trainer_encoding, "parameter_hash", lambda params: "another")
    subject.start_trainer()
    subject.encode_all()
    assert [row for _, row in subject.encoded] == [*range(A_STEP), *range(ROWS)]


def test_a_snapshot_without_finite_vectors_is_passed_over_or_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    subject = Subject(tmp_path, monkeypatch)
    subject.broken = 0
    subject.snapshot(0)
    with pytest.raises(UserError, match=r"no index to go on with: index v0: .*not finite"):
        subject.trainer.wait()
    assert any("waiting for the next checkpoint" in line for line in log_lines)
    subject.snapshot(3)
    subject.encode_all()
    subject.indexer.advance()
    check(subject, 3)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    subject = Subject(tmp_path, monkeypatch)
    subject.snapshot(0)
    monkeypatch.setattr("search_r3_jax.files.save_array", full)
    with pytest.raises(UserError, match=r"shard-00000\.npy: cannot be written .No space left.*; make room"):
        subject.trainer.advance()


def test_vectors_that_are_not_ready_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(tmp_path, monkeypatch)
    subject.snapshot(0)
    subject.encode_all()
    (encoding_folder(tmp_path) / "0" / READY).unlink()
    assert not subject.indexer.advance()
    assert subject.versions() == []


def test_several_indexers_of_such_a_run_are_refused(tmp_path: Path) -> None:
    config = RunConfig(index=IndexConfig(source="trainer"))
    record = {"stage": "rl", "config": dataclasses.asdict(config), "data": "../data", "split": "train"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"--processes: 2: with index\.source trainer the trainer encodes"):
        run_indexer(tmp_path, process=0, processes=2)


SETTINGS: dict[str, Any] = {
    "rl__steps": 12,
    "rl__save_every": 2,
    "rl__keep": 9,
    "rl__global_queries": 4,
    "lora__dropout": 0.0,
    "index__kind": "exact",
    "index__source": "trainer",
    "index__documents_per_step": 9,
    "index__keep_versions": 20,
    "index__max_index_age_steps": 6,
}


def has_lines(place: Place, wanted: int) -> bool:
    return len(place.lines("killed")) >= wanted


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_run_killed_at_random_moments_ends_bit_equal(place: Place, tmp_path: Path, kills: int) -> None:
    generator, steps = np.random.default_rng(5), SETTINGS["rl__steps"]
    command = place.command("rl", "killed", **SETTINGS)
    for _ in range(kills):
        process = place.start(command)
        wanted = min(len(place.lines("killed")) + int(generator.integers(1, 5)), steps)
        until(partial(has_lines, place, wanted), process)
        process.kill()
        process.wait()
    place.finish(command)
    killed = [computed(line) for line in place.lines("killed")]
    assert len(killed) == steps
    assert max(line["index_step"] for line in killed) > 0
    place.finish(place.command("rl", "whole", "--replay", str(tmp_path / "killed"), **SETTINGS))
    assert [computed(line) for line in place.lines("whole")] == killed
    equal(place.params("killed", steps), place.params("whole", steps))

    # A version is what its checkpoint's parameters say of the corpus.
    root = index_folder(tmp_path / "killed")
    step = current_version(root)
    assert step
    index = open_version(root, step)
    checkpoint = load_model(tmp_path / "killed", step=step)
    graph, state = nnx.split(checkpoint.decoder)
    texts = [document.body for document in word_collection(documents=40, queries=20).documents]
    encoder = Encoder(graph, Prompter(checkpoint.tokenizer))
    found = index.take(np.arange(40, dtype=np.int32))
    np.testing.assert_allclose(found, encoder.encode(state, texts, max_tokens=32), atol=1e-5)
    # Both runs encoded the same snapshots: the same bytes, whatever was interrupted.
    both = set(list_versions(root)) & set(list_versions(index_folder(tmp_path / "whole")))
    for version in both:
        one, other = (tmp_path / run / "index" / f"v{version}" / "vectors.npy" for run in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_compute_what_one_computes(place: Place, tmp_path: Path) -> None:
    for process in place.cluster(place.command("rl", "two", **SETTINGS), processes=2, devices=2):
        assert process.wait(timeout=600) == 0, (tmp_path / "out-0.txt").read_text()[-3000:]
    two = [computed(line) for line in place.lines("two")]
    assert max(line["index_step"] for line in two) > 0
    place.finish(place.command("rl", "one", "--replay", str(tmp_path / "two"), **SETTINGS), devices=4)
    for ours, theirs in zip(map(computed, place.lines("one")), two, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in theirs.items()}
