"""Publishing and opening versions, in a folder and in a bucket: nothing half-made is ever current, nothing
damaged is ever opened."""

import contextlib
import itertools
import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from helpers.failing_disk import DISK_FULL, PowerCut, failing
from helpers.fake_bucket import fake_bucket, forget
from helpers.index_versions import FIELDS, publish, stored_files, unit
from helpers.platforms import needs_scann

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.scann import ScannIndex, ScannSettings
from search_r3_jax.retrieval.store import versions
from search_r3_jax.retrieval.store.vector_files import chunks_of, write_vectors
from search_r3_jax.retrieval.store.versions import (
    IndexGateError,
    IndexVersionError,
    current_version,
    list_versions,
    open_version,
    pin_versions,
    pinned_versions,
    prune_versions,
    read_version,
)

KINDS = ["exact", pytest.param("scann", marks=needs_scann)]


@pytest.fixture(params=["folder", "bucket"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[epath.Path]:
    """Where versions are published; what belongs to a bucket and is local goes below `tmp_path` too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with fake_bucket():
        yield epath.Path(tmp_path / "index" if request.param == "folder" else "gs://bucket/run/index")


@needs_scann
def test_a_version_in_parts(root: epath.Path) -> None:
    info = publish(root, kind="scann", parts=3)
    assert info.manifest["parts"] == 3
    folders = {name.split("/")[0] for name in info.manifest["sha256"] if name.startswith("scann")}
    assert folders == {f"scann-{part:05d}-of-00003" for part in range(3)}
    publish(root, 6, kind="scann")
    asked = unit(7, seed=1)
    # Copies fetched from a bucket are kept by step, so each is looked at before the other is opened.
    found = [open_version(root, step).search(asked, 20) for step in (5, 6)]
    for in_parts, whole in zip(*found, strict=True):
        np.testing.assert_allclose(in_parts, whole, atol=1e-6)
    second = open_version(root, 5, share=(1, 2))
    # The middle part of 67, 67 and 66 rows.
    assert all(sorted(rows) == list(range(67, 134)) for rows in second.search(asked, 67)[1].tolist())
    assert second.shape == (200, 24)
    with pytest.raises(IndexVersionError, match="manifest_sha256 is"):
        open_version(root, 5, expect_digest="0")
    if not str(root).startswith("gs://"):
        damaged = next(root / "v5" / name for name in info.manifest["sha256"] if "00002-of" in name)
        damaged.write_bytes(damaged.read_bytes() + b"x")
        with pytest.raises(IndexVersionError, match="does not match its checksum"):
            open_version(root, 5, share=(0, 3))


@pytest.mark.parametrize("vector_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_roundtrip(root: epath.Path, kind: str, vector_dtype: str) -> None:
    assert current_version(root) is None
    assert list_versions(root / "nowhere") == []
    info = publish(root, kind=kind, vector_dtype=vector_dtype)
    index = open_version(root, 5, expect_corpus_hash="c", expect_embed_token_id=9)
    assert (current_version(root), list_versions(root), index.version, index.kind) == (5, [5], 5, kind)
    assert list(index.ids) == [f"d{row}" for row in range(200)]
    tolerance = 0 if vector_dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(index.vectors, np.float32), unit(200), rtol=tolerance)
    assert isinstance(index.vectors.base if vector_dtype == "bfloat16" else index.vectors, np.memmap)

    queries = unit(6, seed=1)
    expected = np.argsort(-(queries.astype(np.float64) @ np.asarray(index.vectors, np.float64).T), axis=1)[
        :, :10
    ]
    np.testing.assert_array_equal(index.search(queries, 10)[1], expected)

    manifest = json.loads((root / "v5" / "MANIFEST.json").read_text())
    assert manifest == json.loads(json.dumps(dict(info.manifest)))
    assert FIELDS.items() <= manifest.items()
    assert (manifest["step"], manifest["kind"], manifest["recall_at_10"]) == (5, kind, 1.0)
    assert set(manifest["sha256"]) == set(stored_files(root / "v5")) - {"MANIFEST.json"}
    assert dict(read_version(root, 5).manifest) == manifest
    assert not [name for name in stored_files(root) if name.startswith(".tmp-")]


@needs_scann
def test_a_flipped_byte_in_any_file_is_refused(root: epath.Path) -> None:
    publish(root, kind="scann", settings=ScannSettings(method="tree_ah", leaves=10, leaves_to_search=10))
    files = stored_files(root / "v5")
    assert len(files) >= 9
    for name, content in files.items():
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        (root / "v5" / name).write_bytes(bytes(damaged))
        with pytest.raises(IndexVersionError) as caught:
            open_version(root, 5)
        assert "\n" not in str(caught.value)
        (root / "v5" / name).write_bytes(content)
    open_version(root, 5)


def test_files_too_many_or_too_few_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    stranger = tmp_path / "v5" / "scann_docids.pkl"
    stranger.write_bytes(b"")
    with pytest.raises(IndexVersionError, match="pkl"):
        open_version(tmp_path, 5)
    stranger.unlink()
    (tmp_path / "v5" / "ids.json").unlink()
    with pytest.raises(IndexVersionError, match="ids"):
        open_version(tmp_path, 5)
    with pytest.raises(IndexVersionError, match="ids"):
        open_version(tmp_path, 5, verify=False)
    with pytest.raises(IndexVersionError, match="no such"):
        open_version(tmp_path, 6)


def test_a_renamed_version_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / "v5").rename(tmp_path / "v6")
    with pytest.raises(IndexVersionError, match="step 6"):
        open_version(tmp_path, 6)


@pytest.mark.parametrize("expected", [{"expect_corpus_hash": "other"}, {"expect_embed_token_id": 8}])
@pytest.mark.parametrize("verify", [True, False])
def test_another_corpus_or_token_is_refused(root: epath.Path, expected: dict[str, Any], verify: bool) -> None:
    publish(root)
    with pytest.raises(IndexVersionError, match="expected"):
        open_version(root, 5, verify=verify, **expected)
    assert issubclass(IndexVersionError, UserError)
    assert issubclass(IndexGateError, UserError)


@pytest.mark.parametrize("error", [PowerCut(), DISK_FULL], ids=["power cut", "disk full"])
def test_a_failure_at_any_write_leaves_current_alone_and_the_next_try_succeeds(
    root: epath.Path, error: BaseException
) -> None:
    for at in itertools.count():
        runs = root / f"run{at}"
        publish(runs)
        before = stored_files(runs)
        with failing(at, error, writes_only=error is DISK_FULL) as count, contextlib.suppress(type(error)):
            publish(runs, step=8)
        if count[0] <= at:
            break
        forget()
        assert current_version(runs) == 5
        published = list_versions(runs)
        assert published in ([5], [5, 8])
        for step in published:
            open_version(runs, step)
        if error is DISK_FULL:
            # Cleaning up takes no room.
            assert {name for name in stored_files(runs) if not name.startswith("v8/")} == set(before)
            assert 8 in published or stored_files(runs) == before
        publish(runs, step=8)
        assert current_version(runs) == 8
        open_version(runs, 8)
        assert prune_versions(runs, keep=1, stale_seconds=0) == [5]
        assert {name.split("/")[0] for name in stored_files(runs)} == {"CURRENT", "v8"}
    assert at > 8
    assert current_version(runs) == 8


def test_an_interrupted_deletion_leaves_whole_versions(root: epath.Path) -> None:
    for at in itertools.count():
        runs = root / f"run{at}"
        publish(runs)
        publish(runs, step=8)
        with failing(at, PowerCut(), writes_only=False) as count, contextlib.suppress(PowerCut):
            prune_versions(runs, keep=1)
        if count[0] <= at:
            break
        for step in list_versions(runs):
            open_version(runs, step)
        publish(runs, step=9)
        prune_versions(runs, keep=1, stale_seconds=0)
        assert {name.split("/")[0] for name in stored_files(runs)} == {"CURRENT", "v9"}
    assert at > 2


@needs_scann
def test_scann_on_a_full_disk_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)

    class Full:
        def serialize(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Failed to extract SingleMachineFactoryOptions: I/O error")

    build = ScannIndex.build

    def without_room(*arguments: Any) -> ScannIndex:
        built = build(*arguments)
        built._searcher = Full()
        return built

    monkeypatch.setattr(ScannIndex, "build", without_room)
    with pytest.raises(OSError, match="I/O error"):
        publish(tmp_path, step=8, kind="scann")
    assert (current_version(tmp_path), list(tmp_path.glob(".tmp-*"))) == (5, [])


def test_remains_of_a_killed_writer_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".tmp-v5").mkdir()
    (tmp_path / ".tmp-v5" / "vectors.npy").write_bytes(b"half")
    (tmp_path / ".tmp-v5" / "stranger").write_bytes(b"")
    assert list_versions(tmp_path) == []
    publish(tmp_path)
    assert "stranger" not in stored_files(tmp_path / "v5")
    open_version(tmp_path, 5)


def test_a_step_is_published_once(root: epath.Path) -> None:
    publish(root)
    before = stored_files(root)
    publish(root, vectors=unit(200, seed=3))
    assert stored_files(root) == before
    with pytest.raises(IndexVersionError, match="parameter_hash"):
        publish(root, manifest_fields={**FIELDS, "parameter_hash": "q"})


@needs_scann
def test_gate_publishes_nothing(root: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(root)
    before = stored_files(root)
    search = ScannIndex.search

    def forgets_half(self: ScannIndex, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = search(self, queries, 2 * k)
        return scores[:, ::2], rows[:, ::2]

    monkeypatch.setattr(ScannIndex, "search", forgets_half)
    with pytest.raises(IndexGateError, match=r"recall@10 0\.5000"):
        publish(root, step=8, kind="scann", probe_queries=unit(30, seed=2))
    assert stored_files(root) == before
    assert current_version(root) == 5
    info = publish(root, step=8, kind="scann", probe_queries=unit(30, seed=2), recall_gate=0.5)
    assert info.manifest["recall_at_10"] == 0.5


@pytest.mark.parametrize("value", [np.nan, 0.9])
def test_broken_vectors_do_not_pass_the_gate(root: epath.Path, value: float) -> None:
    vectors = unit(200)
    vectors[17] = value
    with pytest.raises(IndexGateError, match="row 17"):
        publish(root, vectors=vectors)
    assert stored_files(root) == {}


def test_copies_of_a_document_do_not_fail_the_gate(tmp_path: Path) -> None:
    publish(tmp_path, vectors=np.repeat(unit(5), 40, axis=0), kind="auto")


@pytest.mark.parametrize(
    "wrong", [{"ids": ["a"] * 200}, {"ids": ["a"]}, {"manifest_fields": {}}, {"step": -1}]
)
def test_bad_arguments(root: epath.Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="want"):
        publish(root, **wrong)
    assert stored_files(root) == {}


def test_prune_respects_current_and_pins(root: epath.Path) -> None:
    for step in (1, 2, 3, 4, 10):
        publish(root, step=step)
    (root / "CURRENT").write_text("2\n")
    assert prune_versions(root, keep=1, pinned=[3, 77]) == [1, 4]
    assert list_versions(root) == [2, 3, 10]
    assert prune_versions(root, keep=0) == [3, 10]
    assert sorted(path.name for path in root.iterdir()) == ["CURRENT", "v2"]
    open_version(root, 2)


def test_prune_removes_old_temporaries(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / ".tmp-v99").mkdir()
    assert prune_versions(tmp_path, keep=1) == []
    assert (tmp_path / ".tmp-v99").exists()
    assert prune_versions(tmp_path, keep=1, stale_seconds=0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", "v5"]


def test_prune_deletes_nothing_when_current_is_unreadable(root: epath.Path) -> None:
    publish(root)
    (root / "CURRENT").write_text("garbage")
    with pytest.raises(IndexVersionError, match="garbage"):
        prune_versions(root, keep=0)
    assert list_versions(root) == [5]


@needs_scann
def test_without_scann_a_scann_version_is_searched_exactly(
    root: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(root, kind="scann")
    monkeypatch.setattr(versions, "scann_available", lambda: False)
    assert open_version(root, 5).kind == "exact"


def test_a_version_in_use_is_not_pruned_until_another_is(root: epath.Path) -> None:
    for step in (1, 2, 3, 4):
        publish(root, step=step)
    assert pinned_versions(root) == []
    pin_versions(root, {2})
    assert prune_versions(root, keep=1) == [1, 3]
    pin_versions(root, [4])
    assert pinned_versions(root) == [4]
    assert prune_versions(root, keep=1) == [2]
    (root / "IN_USE").write_text("four")
    with pytest.raises(IndexVersionError, match="IN_USE: is no list of steps"):
        prune_versions(root, keep=1)


def test_vectors_are_published_in_chunks(tmp_path: Path) -> None:
    rows, dim = 60_000, 64
    stored = np.lib.format.open_memmap(tmp_path / "given.npy", mode="w+", dtype=np.float32, shape=(rows, dim))
    stored[:] = np.eye(dim, dtype=np.float32)[np.arange(rows) % dim]
    stored.flush()
    tracemalloc.start()
    write_vectors(
        tmp_path / "written.npy",
        chunks_of(np.load(tmp_path / "given.npy", mmap_mode="r")),
        (rows, dim),
        "float32",
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stored.nbytes / 4
    np.testing.assert_array_equal(np.load(tmp_path / "written.npy"), stored)
