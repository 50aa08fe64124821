"""Versions in a bucket: what a reader keeps of them on its own disk, and how it hears of what others
wrote."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.failing_disk import DISK_FULL, failing
from helpers.fake_bucket import FakeBucket, fake_bucket, forget
from helpers.index_versions import publish, stored_files, unit

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.store.versions import (
    IndexVersionError,
    current_version,
    list_versions,
    open_version,
    pin_versions,
    pinned_versions,
    prune_versions,
)

ROOT = "gs://bucket/index"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with fake_bucket():
        yield


def test_a_sound_copy_is_taken_again(tmp_path: Path) -> None:
    publish(ROOT)
    first = open_version(ROOT, 5)
    FakeBucket.reads.clear()
    forget()
    np.testing.assert_array_equal(open_version(ROOT, 5).vectors, first.vectors)
    assert {name.split("/")[-1] for name in FakeBucket.reads} == {"MANIFEST.json"}
    open_version(ROOT, 5, cache=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "v5" / "vectors.npy").exists()
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("damage", ["changed", "gone", "stranger"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    publish(ROOT)
    open_version(ROOT, 5, cache=tmp_path)
    vectors = tmp_path / "v5" / "vectors.npy"
    if damage == "changed":
        vectors.write_bytes(vectors.read_bytes()[:-1] + b"x")
    elif damage == "gone":
        vectors.unlink()
    else:
        (tmp_path / "v5" / "scann_docids.pkl").write_bytes(b"")
    np.testing.assert_array_equal(open_version(ROOT, 5, cache=tmp_path).vectors, unit(200))
    assert sorted(stored_files(tmp_path / "v5")) == ["ids.json", "vectors.npy"]


def test_a_full_disk_is_a_doubt(tmp_path: Path) -> None:
    publish(ROOT)
    with (
        failing(3, DISK_FULL, writes_only=True),
        pytest.raises(IndexVersionError, match=r"cannot be copied to .*No space left"),
    ):
        open_version(ROOT, 5, cache=tmp_path)
    assert stored_files(tmp_path) == {}
    open_version(ROOT, 5, cache=tmp_path)


def test_copies_go_with_their_versions(tmp_path: Path) -> None:
    for step in (1, 2):
        publish(ROOT, step=step)
        open_version(ROOT, step, cache=tmp_path)
    prune_versions(ROOT, keep=1)
    open_version(ROOT, 2, cache=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tmp", "v2"]


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    publish(ROOT)
    manifest = json.loads(FakeBucket.objects["bucket/index/v5/MANIFEST.json"])
    del manifest["manifest_sha256"]
    manifest["sha256"]["../../escaped"] = manifest["sha256"].pop("ids.json")
    FakeBucket.objects["bucket/index/escaped"] = FakeBucket.objects["bucket/index/v5/ids.json"]
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    FakeBucket.objects["bucket/index/v5/MANIFEST.json"] = json.dumps(manifest).encode()
    with pytest.raises(IndexVersionError, match="outside its folder"):
        open_version(ROOT, 5, cache=tmp_path / "deep" / "cache")
    assert not list(tmp_path.rglob("escaped"))


def test_what_others_write_is_seen() -> None:
    publish(ROOT)
    assert list_versions(ROOT) == [5]
    pin_versions(ROOT, [5])
    assert prune_versions(ROOT, keep=0) == []
    FakeBucket.objects["bucket/index/IN_USE"] = b"[5, 1000]\n"
    assert pinned_versions(ROOT) == [5, 1000]
    FakeBucket.objects["bucket/index/v7/MANIFEST.json"] = b"{}"
    assert list_versions(ROOT) == [5, 7]


def test_a_bucket_that_nothing_reads_is_one_line() -> None:
    with pytest.raises(UserError, match="s3fs") as caught:
        current_version("s3://bucket/index")
    assert "\n" not in str(caught.value)


def test_the_next_publication_removes_what_interrupted_ones_left() -> None:
    FakeBucket.objects.update({"bucket/index/v3/vectors.npy": b"half", "bucket/index/v5/stranger": b""})
    assert list_versions(ROOT) == []
    publish(ROOT)
    assert sorted(stored_files(ROOT)) == ["CURRENT", "v5/MANIFEST.json", "v5/ids.json", "v5/vectors.npy"]
