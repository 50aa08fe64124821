"""An index that rolls: which rows are of which step, what a search finds, and the same after a resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import Place, computed, equal, until
from helpers.stepped_vectors import DIM, vectors_of
from helpers.tiny_models import word_collection

from search_r3_jax.config import IndexConfig, RlConfig, RunConfig
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import StoppedError, UserError
from search_r3_jax.retrieval.indexer.worker import run_indexer
from search_r3_jax.retrieval.store.rolling_dumps import (
    RollingDumps,
    discard_dumps_after,
    dump_folder,
    dump_steps,
)
from search_r3_jax.training.index_state import IndexedCorpus, IndexStart
from search_r3_jax.training.rolling_index import RollingIndex, RollingVectors, check_rolling

ROWS, STEPS = 50, 20
COLLECTION = word_collection(documents=ROWS, queries=4)


class Rolled:
    """A rolling index over vectors that are known, and what should be in it: row → step."""

    def __init__(self, run: Path, start: IndexStart | None = None, **settings: Any):
        self.start, self.config = start or IndexStart(), make_config(**settings)
        self.now = self.start.step
        corpus = indexed(self.config, lambda rows: vectors_of(rows, self.now))
        self.vectors = RollingVectors(Team(), corpus)
        self.index = RollingIndex.open(run, corpus, self.vectors, start=self.start, on_wait=lambda step: None)

    def step(self, step: int, refreshed: np.ndarray) -> None:
        self.now = step
        self.index.before_step(step, save=lambda: pytest.fail("nothing waits for a save"))
        if len(refreshed):
            np.testing.assert_array_equal(
                self.index.environment.encode_documents(refreshed), vectors_of(refreshed, step)
            )

    def save(self, step: int) -> IndexStart:
        arrays = self.index.checkpoint_arrays()
        return IndexStart(step=step, statistics=self.index.statistics, arrays=arrays)


def indexed(config: RunConfig, encode: Callable[[np.ndarray], np.ndarray]) -> IndexedCorpus:
    return IndexedCorpus(
        config=config,
        collection=COLLECTION,
        encode=encode,
        encode_with=lambda params, rows: pytest.fail("there are no snapshots"),
        trainable=nnx.State({}),
        embed_id=0,
        dim=DIM,
    )


def make_config(**settings: Any) -> RunConfig:
    index = IndexConfig(kind="device", source="rolling", recall_gate=1.0, documents_per_step=7)
    return RunConfig(index=dataclasses.replace(index, **settings))


def _has_lines(place: Place, wanted: int) -> bool:
    return len(place.lines("killed")) >= wanted


def check(subject: Rolled, expected: np.ndarray) -> None:
    """The index holds the vector of each row at its step, and finds what comparing all of them finds."""
    rows = np.arange(ROWS, dtype=np.int32)
    wanted = np.concatenate([vectors_of(rows[row : row + 1], int(expected[row])) for row in rows])
    if subject.config.index.vector_dtype == "bfloat16":
        # Round to nearest even, by hand: the upper half of the bits, and one more where the lower rounds up.
        bits = wanted.view(np.uint32)
        wanted = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(subject.vectors.take(rows), wanted)
    np.testing.assert_array_equal(subject.vectors.encoded_at, expected)
    assert subject.vectors.version == expected.min()
    queries = vectors_of(np.arange(5), 10_000)
    _, found = subject.vectors.search(queries, 3)
    if subject.config.index.vector_dtype == "float32":
        assert found.tolist() == np.argsort(-(queries @ wanted.T), axis=1)[:, :3].tolist()


@pytest.mark.parametrize(("dtype", "seed"), [("float32", 0), ("float32", 1), ("bfloat16", 2)])
def test_each_row_is_of_its_step_also_after_a_resume_from_any_checkpoint(
    tmp_path: Path, seed: int, dtype: str
) -> None:
    generator = np.random.default_rng(seed)
    settings = {"vector_dtype": dtype, "documents_per_step": int(generator.integers(1, 60))}
    subject = Rolled(tmp_path, **settings)
    steps, cursor = np.zeros(ROWS, np.int64), 0
    saved: dict[int, tuple[IndexStart, np.ndarray]] = {0: (IndexStart(), steps.copy())}
    check(subject, steps)
    refreshes = [
        generator.permutation(ROWS)[: generator.integers(0, 6)].astype(np.int32) for _ in range(STEPS)
    ]
    count = min(settings["documents_per_step"], ROWS)
    for step in range(STEPS):
        subject.step(step, refreshes[step])
        if step:
            steps[(cursor + np.arange(count)) % ROWS] = step
        cursor = (cursor + count) % ROWS
        steps[refreshes[step]] = step
        check(subject, steps)
        if generator.random() < 0.4:
            saved[step + 1] = subject.save(step + 1), steps.copy()
    assert len(saved) > 5
    # From a checkpoint, the same steps lead to the same index, beside dumps that a killed run left.
    for step in (0, *sorted(saved)[1:-1:3]):
        start, expected = saved[step]
        run = tmp_path / f"copy-{step}"
        shutil.copytree(dump_folder(tmp_path), dump_folder(run))
        again = Rolled(run, start, **settings)
        check(again, expected)
        # Another number of processes would write them differently in the last bit.
        assert max(dump_steps(dump_folder(run))) == step
        for later in range(step, STEPS):
            again.step(later, refreshes[later])
            if later + 1 in saved:
                again.save(later + 1)
        check(again, steps)
        newest = Rolled(run, saved[max(saved)][0], **settings)
        check(newest, saved[max(saved)][1])


def test_dumps_hold_what_changed_and_old_ones_go(tmp_path: Path) -> None:
    subject = Rolled(tmp_path)
    for step in range(40):
        subject.step(step, np.zeros(0, np.int32))
        if step % 2:
            subject.save(step + 1)
            # As Orbax keeps them: the two newest.
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            for kept in (step - 1, step + 1):
                (tmp_path / "checkpoints" / str(kept)).mkdir(parents=True)
    sizes = {
        step: len(np.load(dump_folder(tmp_path) / str(step) / "rows.npy"))
        for step in dump_steps(dump_folder(tmp_path))
    }
    # 14 rows change between two dumps; the fourth would make it more than the corpus.
    assert set(sizes.values()) <= {14, ROWS}
    assert len(sizes) <= 6
    assert sum(size == ROWS for size in sizes.values()) <= 2


def test_a_damaged_or_missing_dump_is_refused_and_may_be_encoded_anew(tmp_path: Path) -> None:
    subject = Rolled(tmp_path)
    for step in range(4):
        subject.step(step, np.zeros(0, np.int32))
    start = subject.save(4)
    vectors = dump_folder(tmp_path) / "4" / "vectors.npy"
    content = bytearray(vectors.read_bytes())
    content[-3] ^= 1
    vectors.write_bytes(content)
    with pytest.raises(UserError, match=r"vectors\.npy: does not match its checksum"):
        Rolled(tmp_path, start)
    shutil.rmtree(dump_folder(tmp_path) / "4")
    with pytest.raises(UserError, match="4: missing; --allow-config-change encodes the corpus anew"):
        Rolled(tmp_path, start)
    anew = Rolled(tmp_path, dataclasses.replace(start, allow_other_version=True))
    check(anew, np.full(ROWS, 4))
    assert 4 in dump_steps(dump_folder(tmp_path))
    discard_dumps_after(tmp_path, 3)
    assert dump_steps(dump_folder(tmp_path)) == [0]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Rolled(tmp_path)
    subject.step(0, np.zeros(0, np.int32))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RollingDumps, "write", full)
    with pytest.raises(UserError, match=r"of step 1: cannot be written .No space left.*; make room"):
        subject.save(1)


def test_a_stop_while_the_corpus_is_encoded_leaves_no_dump(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        raise StoppedError("asked to")

    corpus = indexed(make_config(), lambda rows: vectors_of(rows, 0))
    vectors = RollingVectors(Team(), corpus)
    with pytest.raises(StoppedError):
        RollingIndex.open(tmp_path, corpus, vectors, start=IndexStart(), on_wait=stop)
    assert dump_steps(dump_folder(tmp_path)) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "scann"}, "index.kind: scann: .* give device"),
        ({"scoring": "consistent_stale"}, "index.scoring: consistent_stale: .* give fresh or stale"),
        ({"drift_every": 3}, "index.drift_every: 3: .* give 0"),
        ({"max_index_age_steps": 9}, "index.max_index_age_steps: 9: .* give 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    check_rolling(make_config(), None)
    with pytest.raises(UserError, match=said):
        check_rolling(make_config(**settings), None)
    check_rolling(dataclasses.replace(make_config(**settings), index=IndexConfig(**settings)), None)


def test_swaps_and_replays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl\.min_swaps: 1: .* give 0"):
        check_rolling(dataclasses.replace(make_config(), rl=RlConfig(min_swaps=1)), None)
    with pytest.raises(UserError, match=r"--replay: .* leave it out"):
        check_rolling(make_config(), tmp_path)


def test_an_indexer_of_such_a_run_is_refused(tmp_path: Path) -> None:
    record = {"stage": "rl", "config": dataclasses.asdict(make_config()), "data": "../data", "split": "train"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"index\.source: rolling: the trainer needs no indexer"):
        run_indexer(tmp_path)


SETTINGS: dict[str, Any] = {
    "rl__steps": 10,
    "rl__global_queries": 4,
    "lora__dropout": 0.0,
    "index__kind": "device",
    "index__source": "rolling",
    "index__documents_per_step": 9,
}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_run_killed_at_random_moments_ends_bit_equal(place: Place, tmp_path: Path, kills: int) -> None:
    generator, steps = np.random.default_rng(3), SETTINGS["rl__steps"]
    place.finish(place.command("rl", "whole", **SETTINGS))
    whole = [computed(line) for line in place.lines("whole")]
    assert not (tmp_path / "whole" / "indexer.log").exists()
    # 40 documents, 9 a step: none is older than five steps.
    assert 0 < max(line["index_age"] for line in whole) <= 5
    command = place.command("rl", "killed", **SETTINGS)
    for _ in range(kills):
        process = place.start(command)
        wanted = min(len(place.lines("killed")) + int(generator.integers(1, 4)), steps)
        until(partial(_has_lines, place, wanted), process)
        process.kill()
        process.wait()
        found = place.lines("killed")
        assert [computed(line) for line in found] == whole[: len(found)]
    place.finish(command)
    assert [computed(line) for line in place.lines("killed")] == whole
    equal(place.params("killed", steps), place.params("whole", steps))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_compute_what_one_computes(place: Place, tmp_path: Path) -> None:
    place.finish(place.command("rl", "one", **SETTINGS), devices=4)
    for process in place.cluster(place.command("rl", "two", **SETTINGS), processes=2, devices=2):
        assert process.wait(timeout=600) == 0, (tmp_path / "out-0.txt").read_text()[-3000:]
    one = [computed(line) for line in place.lines("one")]
    assert len(one) == SETTINGS["rl__steps"]
    for ours, theirs in zip(map(computed, place.lines("two")), one, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in theirs.items()}
