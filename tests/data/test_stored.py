"""Documents left on disk are the documents in memory, and are not all read for one of them."""

from pathlib import Path

import pytest
from helpers.tiny_models import word_collection

from search_r3_jax.config import DataConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import for_stage_2, load_training_sets
from search_r3_jax.data.stored import StoredDocuments


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Collection]:
    collection = word_collection(documents=2500, queries=30)
    folder = tmp_path_factory.mktemp("stored") / "data"
    build_dataset({"train": collection}, folder, name="words", source={"kind": "test"})
    return folder, collection


def test_rows_slices_and_iteration(built: tuple[Path, Collection]) -> None:
    folder, collection = built
    found = load_collection(folder, "train", stored=True)
    documents = found.documents
    assert isinstance(documents, StoredDocuments)
    assert len(documents) == 2500
    assert tuple(documents) == collection.documents
    for row in (0, 1, 1023, 1024, 2499, -1, -2500):
        assert documents[row] == collection.documents[row]
    for part in (slice(7, 20), slice(2400, 9999), slice(5, 5), slice(None, None, 500), slice(30, 20, -3)):
        assert documents[part] == collection.documents[part]
    for row in (2500, -2501):
        with pytest.raises(IndexError, match=f"row {row} of 2500"):
            documents[row]
    assert found.corpus_hash() == collection.corpus_hash()
    assert found.row_of == collection.row_of
    assert found.queries == collection.queries


def test_one_document_is_one_read(built: tuple[Path, Collection], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = load_collection(built[0], "train", stored=True).documents
    assert isinstance(documents, StoredDocuments)
    asked: list[int] = []
    read = documents._read
    monkeypatch.setattr(documents, "_read", lambda rows: asked.append(len(rows)) or read(rows))
    assert documents[1700].doc_id == "d1700"
    assert len(documents[100:164]) == 64
    assert next(iter(documents)).doc_id == "d0"
    assert asked == [1, 64, 1024]


def test_stage_2_sees_the_same_corpus(built: tuple[Path, Collection]) -> None:
    for config in (
        DataConfig(sets=(str(built[0]),)),
        DataConfig(sets=(str(built[0]),), rl_documents=200, rl_queries=9),
    ):
        on_disk, in_memory = (
            for_stage_2(load_training_sets(config, stored=stored)[0], config) for stored in (True, False)
        )
        assert on_disk.train.corpus_hash() == in_memory.train.corpus_hash()
        assert on_disk.train.queries == in_memory.train.queries
        assert on_disk.dev is not None
        assert on_disk.dev == in_memory.dev
