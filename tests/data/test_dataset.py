import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("SEARCH_R3_DATA", REPOSITORY.parent / "shared" / "data"))
SOURCE = {"kind": "made up", "seed": 1}


def collection(split: str, *, documents: int = 2500, queries: int = 30, prefix: str = "d") -> Collection:
    # Ids count down and texts vary, so that neither sorting by id nor by text restores the order by accident.
    return Collection(
        name="made",
        split=split,
        documents=tuple(
            Document(
                doc_id=f"{prefix}{documents - row}",
                title="é" * (row % 3),
                text=f"\u2028text {row * 7919 % 1000}\n",
            )
            for row in range(documents)
        ),
        queries=tuple(
            Query(
                query_id=f"{split}-{queries - row}",
                text=f"query {row} ü",
                positives={f"{prefix}{row + 2}": 2, f"{prefix}{row + 1}": 1},
                negatives=tuple(f"{prefix}{row + other}" for other in range(3, 3 + row % 3)),
                instruction="find the text" * (row % 2),
                reasoning="ü\n" * (row % 3),
            )
            for row in range(queries)
        ),
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_round_trip_with_a_shared_corpus(tmp_path: Path) -> None:
    collections = {split: collection(split) for split in ("train", "test")}
    out = build_dataset(collections, tmp_path / "set", name="made", source=SOURCE)
    for split, expected in collections.items():
        loaded = load_collection(out, split)
        assert loaded == expected
        assert [list(query.positives) for query in loaded.queries] == [
            list(query.positives) for query in expected.queries
        ]
    manifest = json.loads((out / "dataset.json").read_text())
    assert {each["corpus_split"] for each in manifest["splits"].values()} == {"shared"}
    assert manifest["splits"]["train"]["corpus_hash"] == collections["train"].corpus_hash()
    assert (manifest["name"], manifest["source"], manifest["splits"]["test"]["queries"]) == (
        "made",
        SOURCE,
        30,
    )
    assert list(tmp_path.iterdir()) == [out]


def test_round_trip_with_a_corpus_per_split(tmp_path: Path) -> None:
    collections = {split: collection(split, documents=50, prefix=split) for split in ("train", "dev")}
    out = build_dataset(collections, tmp_path / "set", name="made", source=SOURCE)
    assert {split: load_collection(out, split) for split in collections} == collections


def test_rebuild_is_bit_identical(tmp_path: Path) -> None:
    collections = {split: collection(split) for split in ("train", "test")}
    first = build_dataset(collections, tmp_path / "one", name="made", source=SOURCE)
    second = build_dataset(collections, tmp_path / "two", name="made", source=SOURCE)
    assert files(first) == files(second)
    # The manifest; facts and TFDS's two beside a corpus of one file, TFDS's two beside queries of two.
    assert len(files(first)) == 1 + (1 + 2 + 1) + (2 + 2)


def test_equal_data_set_is_reused_and_others_are_refused(tmp_path: Path) -> None:
    collections = {"train": collection("train", documents=40, queries=5)}
    out = build_dataset(collections, tmp_path / "set", name="made", source=SOURCE)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert build_dataset(collections, out, name="made", source=SOURCE) == out
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    for change in ({"text": "changed"}, {"instruction": "changed"}, {"reasoning": "changed"}):
        queries = (replace(collections["train"].queries[0], **change), *collections["train"].queries[1:])
        changed = {"train": replace(collections["train"], queries=queries)}
        with pytest.raises(
            UserError,
            match=r"holds another data set \(differs in splits\); remove it or choose another --out",
        ):
            build_dataset(changed, out, name="made", source=SOURCE)
    with pytest.raises(UserError, match=r"differs in skipped"):
        build_dataset(collections, out, name="made", source=SOURCE, skipped={"not UTF-8": 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="is no data set; remove it or choose another --out"):
        build_dataset(collections, tmp_path / "other", name="made", source=SOURCE)
    assert (tmp_path / "other" / "precious.txt").read_text() == "keep"


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert any(tmp_path.iterdir())
        raise OSError("disk full")

    monkeypatch.setattr("tensorflow_datasets.core.DatasetInfo.write_to_directory", fail)
    with pytest.raises(OSError, match="disk full"):
        build_dataset(
            {"train": collection("train", documents=3, queries=1)},
            tmp_path / "set",
            name="made",
            source=SOURCE,
        )
    assert list(tmp_path.iterdir()) == []


def test_damage_and_wrong_paths_are_user_errors(tmp_path: Path) -> None:
    collections = {"train": collection("train", documents=40, queries=5)}
    out = build_dataset(collections, tmp_path / "set", name="made", source=SOURCE)
    with pytest.raises(UserError, match="no split 'test'; splits found: train"):
        load_collection(out, "test")
    with pytest.raises(UserError, match=r"expected a built data set .* or a BEIR folder"):
        load_collection(tmp_path, "train")
    (shard,) = out.glob("corpus/*array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="content differs from its sha256"):
        load_collection(out, "train")
    shard.unlink()
    with pytest.raises(UserError, match="missing; remove"):
        load_collection(out, "train")
    (out / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="field 'format_version': expected 2, got 99"):
        load_collection(out, "train")


def test_building_and_loading_print_nothing_and_import_no_tensorflow(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_dataset import SOURCE, collection
from search_r3_jax.data.dataset import build_dataset, load_collection
out = build_dataset({{"train": collection("train")}}, Path(sys.argv[1]), name="made", source=SOURCE)
assert load_collection(out, "train") == collection("train")
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    command = [sys.executable, "-c", program, str(tmp_path / "set")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_beir_folder_survives_the_round_trip(tmp_path: Path) -> None:
    folder = REAL_DATA / "conala"
    if not folder.is_dir():
        pytest.skip("no conala in SEARCH_R3_DATA")
    collections = {split: load_collection(folder, split) for split in ("train", "test")}
    out = build_dataset(collections, tmp_path / "conala", name="conala", source={"kind": "beir"})
    assert {split: load_collection(out, split) for split in collections} == collections
