"""What a data set keeps of its corpus, so that training does not read it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import word_collection

from search_r3_jax.data.collection import Collection, Document, trainable
from search_r3_jax.data.dataset import MANIFEST, build_dataset, load_collection
from search_r3_jax.data.known_relevance import known_rows
from search_r3_jax.data.stored import StoredDocuments, facts_file
from search_r3_jax.data.subsample import sample_corpus
from search_r3_jax.errors import UserError

NAMES = ["plain", "größer", "a\u2028b", "", "\U0001f600", " with spaces "]


def odd_collection() -> Collection:
    """Ids beyond ASCII, copies, a copy but for a control token, blank bodies, titles."""
    made = word_collection(documents=40, queries=12)
    documents = list(made.documents)
    for row, name in enumerate(NAMES):
        documents[30 + row] = Document(doc_id=f"d{30 + row}{name}", title=name, text=f"text {name}")
    documents[20] = dataclasses.replace(documents[20], text=documents[3].text)
    documents[21] = dataclasses.replace(documents[21], text=f"{documents[3].text}<|embed_token|>")
    documents[5] = dataclasses.replace(documents[5], text=" \n\t")
    return dataclasses.replace(made, documents=tuple(documents))


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build_dataset({"train": odd_collection()}, tmp_path / "data", name="odd", source={"kind": "test"})


def hash_by_hand(documents: Sequence[Document]) -> str:
    content = b""
    for document in documents:
        body = f"{document.title}\n{document.text}" if document.title else document.text
        for field in (document.doc_id, body):
            content += len(field.encode()).to_bytes(8, "big") + field.encode()
    return hashlib.sha256(content).hexdigest()


def test_facts_are_those_of_the_documents(built: Path) -> None:
    expected = odd_collection()
    stored = load_collection(built, "train", stored=True)
    facts = stored.facts
    assert facts.ids == tuple(document.doc_id for document in expected.documents)
    assert facts.corpus_hash == hash_by_hand(expected.documents)
    assert facts.corpus_hash == json.loads((built / MANIFEST).read_text())["splits"]["train"]["corpus_hash"]
    assert np.flatnonzero(facts.blank).tolist() == [5]
    same = [(a, b) for a in range(40) for b in range(a) if (facts.digests[a] == facts.digests[b]).all()]
    assert same == [(20, 3), (21, 3), (21, 20)]
    assert stored.documents_at([33, 2]) == (expected.documents[33], expected.documents[2])


def test_a_stored_corpus_is_not_read_for_them(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load_collection(built, "train")
    stored = load_collection(built, "train", stored=True)
    expected = trainable(in_memory)

    def refuse(self: StoredDocuments, rows: Sequence[int]) -> None:
        raise AssertionError(f"rows {rows} are read")

    with monkeypatch.context() as patched:
        patched.setattr(StoredDocuments, "_read", refuse)
        found = trainable(stored)
        assert found.queries == expected.queries
        assert len(found.queries) == len(in_memory.queries) - 1
        assert found.corpus_hash() == in_memory.corpus_hash()
        assert found.row_of == in_memory.row_of
        assert known_rows(found) == known_rows(expected)
        with pytest.raises(AssertionError, match="are read"):
            next(iter(found.documents))
    # Of a sample only its own documents are read.
    sample, told = sample_corpus(stored, 15, seed=2)
    assert (sample.documents, told) == (sample_corpus(in_memory, 15, seed=2)[0].documents, told)


def test_a_data_set_of_an_earlier_release_is_read_once(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = load_collection(built, "train", stored=True).facts
    kept = facts_file(built / "corpus", "train")
    kept.unlink()
    manifest = json.loads((built / MANIFEST).read_text())
    del manifest["files"]["corpus/train.facts.npz"]
    (built / MANIFEST).write_text(json.dumps(manifest))
    passes, iterate = list[int](), StoredDocuments.__iter__
    monkeypatch.setattr(StoredDocuments, "__iter__", lambda self: passes.append(0) or iterate(self))
    stored = load_collection(built, "train", stored=True)
    for _ in range(2):
        assert stored.facts.ids == facts.ids
        assert trainable(stored).corpus_hash() == facts.corpus_hash
        np.testing.assert_array_equal(stored.facts.digests, facts.digests)
        known_rows(stored)
    assert len(passes) == 1


def test_damage_is_found(built: Path) -> None:
    kept = facts_file(built / "corpus", "train")
    content = bytearray(kept.read_bytes())
    content[-100] ^= 1
    kept.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.facts\.npz: content differs from its sha256"):
        load_collection(built, "train", stored=True)
