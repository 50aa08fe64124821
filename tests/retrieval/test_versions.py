"""Publishing and opening versions: nothing half-made is ever current, nothing damaged is ever opened."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval import versions
from search_r3_jax.retrieval.index import scann_available
from search_r3_jax.retrieval.scann_index import ScannIndex, ScannSettings
from search_r3_jax.retrieval.versions import (
    IndexGateError,
    IndexVersionError,
    VersionInfo,
    current_version,
    list_versions,
    open_version,
    pin_versions,
    pinned_versions,
    prune_versions,
    publish_version,
)

needs_scann = pytest.mark.skipif(not scann_available(), reason="scann has wheels for Linux only")
KINDS = ["exact", pytest.param("scann", marks=needs_scann)]
FIELDS = {"parameter_hash": "p", "corpus_hash": "c", "embed_token_id": 9, "pooling": "embed_token", "encode_seconds": 1.5}


def unit(rows: int, seed: int = 0, dim: int = 24) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def publish(root: Path, step: int = 5, **changes: Any) -> VersionInfo:
    arguments: dict[str, Any] = {
        "vectors": unit(200),
        "ids": [f"d{row}" for row in range(200)],
        "manifest_fields": FIELDS,
        "kind": "exact",
    }
    return publish_version(root, step=step, **{**arguments, **changes})


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("vector_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_roundtrip(tmp_path: Path, kind: str, vector_dtype: str) -> None:
    assert current_version(tmp_path) is None
    assert list_versions(tmp_path / "nowhere") == []
    info = publish(tmp_path, kind=kind, vector_dtype=vector_dtype)
    index = open_version(tmp_path, 5, expect_corpus_hash="c", expect_embed_token_id=9)
    assert (current_version(tmp_path), list_versions(tmp_path), index.version, index.kind) == (5, [5], 5, kind)
    assert list(index.ids) == [f"d{row}" for row in range(200)]
    tolerance = 0 if vector_dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(index.vectors, np.float32), unit(200), rtol=tolerance)
    assert isinstance(index.vectors.base if vector_dtype == "bfloat16" else index.vectors, np.memmap)

    queries = unit(6, seed=1)
    expected = np.argsort(-(queries.astype(np.float64) @ np.asarray(index.vectors, np.float64).T), axis=1)[:, :10]
    np.testing.assert_array_equal(index.search(queries, 10)[1], expected)

    manifest = json.loads((tmp_path / "v5" / "MANIFEST.json").read_text())
    assert manifest == json.loads(json.dumps(dict(info.manifest)))
    assert FIELDS.items() <= manifest.items()
    assert (manifest["step"], manifest["kind"], manifest["recall_at_10"]) == (5, kind, 1.0)
    assert set(manifest["sha256"]) == set(snapshot(tmp_path / "v5")) - {"MANIFEST.json"}
    assert not list(tmp_path.glob(".tmp-*"))


@needs_scann
def test_a_flipped_byte_in_any_file_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, kind="scann", settings=ScannSettings(method="tree_ah", leaves=10, leaves_to_search=10))
    files = snapshot(tmp_path / "v5")
    assert len(files) >= 9
    for name, content in files.items():
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        (tmp_path / "v5" / name).write_bytes(bytes(damaged))
        with pytest.raises(IndexVersionError) as caught:
            open_version(tmp_path, 5)
        assert "\n" not in str(caught.value)
        (tmp_path / "v5" / name).write_bytes(content)
    open_version(tmp_path, 5)


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
def test_another_corpus_or_token_is_refused(tmp_path: Path, expected: dict[str, Any], verify: bool) -> None:
    publish(tmp_path)
    with pytest.raises(IndexVersionError, match="expected"):
        open_version(tmp_path, 5, verify=verify, **expected)
    assert issubclass(IndexVersionError, UserError)
    assert issubclass(IndexGateError, UserError)


@pytest.mark.parametrize("broken", ["rename", "replace"])
def test_a_crash_leaves_current_alone_and_the_next_try_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise OSError("the power went")

    publish(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, broken, crash)
        with pytest.raises(OSError, match="power"):
            publish(tmp_path, step=8)
    assert current_version(tmp_path) == 5
    open_version(tmp_path, 5)
    publish(tmp_path, step=8)
    assert current_version(tmp_path) == 8
    open_version(tmp_path, 8)


def test_remains_of_a_killed_writer_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".tmp-v5").mkdir()
    (tmp_path / ".tmp-v5" / "vectors.npy").write_bytes(b"half")
    (tmp_path / ".tmp-v5" / "stranger").write_bytes(b"")
    assert list_versions(tmp_path) == []
    publish(tmp_path)
    assert "stranger" not in snapshot(tmp_path / "v5")
    open_version(tmp_path, 5)


def test_a_step_is_published_once(tmp_path: Path) -> None:
    publish(tmp_path)
    before = snapshot(tmp_path)
    publish(tmp_path, vectors=unit(200, seed=3))
    assert snapshot(tmp_path) == before
    with pytest.raises(IndexVersionError, match="parameter_hash"):
        publish(tmp_path, manifest_fields={**FIELDS, "parameter_hash": "q"})


@needs_scann
def test_gate_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path)
    before = snapshot(tmp_path)
    search = ScannIndex.search

    def forgets_half(self: ScannIndex, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = search(self, queries, 2 * k)
        return scores[:, ::2], rows[:, ::2]

    monkeypatch.setattr(ScannIndex, "search", forgets_half)
    with pytest.raises(IndexGateError, match=r"recall@10 0\.5000"):
        publish(tmp_path, step=8, kind="scann", probe_queries=unit(30, seed=2))
    assert snapshot(tmp_path) == before
    assert current_version(tmp_path) == 5
    info = publish(tmp_path, step=8, kind="scann", probe_queries=unit(30, seed=2), recall_gate=0.5)
    assert info.manifest["recall_at_10"] == 0.5


@pytest.mark.parametrize("value", [np.nan, 0.9])
def test_broken_vectors_do_not_pass_the_gate(tmp_path: Path, value: float) -> None:
    vectors = unit(200)
    vectors[17] = value
    with pytest.raises(IndexGateError, match="row 17"):
        publish(tmp_path, vectors=vectors)
    assert snapshot(tmp_path) == {}


def test_copies_of_a_document_do_not_fail_the_gate(tmp_path: Path) -> None:
    publish(tmp_path, vectors=np.repeat(unit(5), 40, axis=0), kind="auto")


@pytest.mark.parametrize("wrong", [{"ids": ["a"] * 200}, {"ids": ["a"]}, {"manifest_fields": {}}, {"step": -1}])
def test_bad_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="want"):
        publish(tmp_path, **wrong)
    assert snapshot(tmp_path) == {}


def test_prune_respects_current_and_pins(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        publish(tmp_path, step=step)
    (tmp_path / "CURRENT").write_text("2\n")
    (tmp_path / ".tmp-v99").mkdir()
    assert prune_versions(tmp_path, keep=1, pinned=[3, 77]) == [1, 4]
    assert list_versions(tmp_path) == [2, 3, 10]
    assert (tmp_path / ".tmp-v99").exists()
    assert prune_versions(tmp_path, keep=0, stale_seconds=0) == [3, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", "v2"]
    open_version(tmp_path, 2)


def test_prune_deletes_nothing_when_current_is_unreadable(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / "CURRENT").write_text("garbage")
    with pytest.raises(IndexVersionError, match="garbage"):
        prune_versions(tmp_path, keep=0)
    assert list_versions(tmp_path) == [5]


@needs_scann
def test_without_scann_a_scann_version_is_searched_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, kind="scann")
    monkeypatch.setattr(versions, "scann_available", lambda: False)
    assert open_version(tmp_path, 5).kind == "exact"


def test_a_version_in_use_is_not_pruned_until_another_is(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        publish(tmp_path, step=step)
    assert pinned_versions(tmp_path) == []
    pin_versions(tmp_path, {2})
    assert prune_versions(tmp_path, keep=1) == [1, 3]
    pin_versions(tmp_path, [4])
    assert pinned_versions(tmp_path) == [4]
    assert prune_versions(tmp_path, keep=1) == [2]
    (tmp_path / "IN_USE").write_text("four")
    with pytest.raises(IndexVersionError, match="IN_USE: is no list of steps"):
        prune_versions(tmp_path, keep=1)
