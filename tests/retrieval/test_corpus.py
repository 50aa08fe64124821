"""A corpus in shards: the same vectors in one go, after an interruption and after damage; another corpus or model is refused."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from tiny import word_collection

from search_r3_jax.data.collection import Document
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.retrieval.corpus import encode_corpus
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter

E = 6
DOCUMENTS = word_collection(documents=23, queries=1).documents
SETTINGS: dict[str, Any] = {"model_hash": "m", "max_tokens": 9, "dimension": E, "shard_documents": 5}


class Counted:
    """A made-up encoder that remembers what it was given, and may be stopped before its next call."""

    def __init__(self, *, stop_before: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self._stop_before = stop_before

    def __call__(self, texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        if len(self.calls) == self._stop_before:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        if on_progress is not None:
            on_progress(len(texts))
        return vectors_of(texts)


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=E) for text in texts]).astype(np.float32)


EXPECTED = vectors_of([document.body for document in DOCUMENTS])


def test_vectors_in_order_from_shards_that_add_up(tmp_path: Path) -> None:
    encode, heard = Counted(), []
    found = encode_corpus(encode, DOCUMENTS, tmp_path / "deep" / "work", on_progress=heard.append, **SETTINGS)
    np.testing.assert_array_equal(found, EXPECTED)
    assert (found.dtype, [len(call) for call in encode.calls]) == (np.float32, [5, 5, 5, 5, 3])
    assert sum(heard) == len(DOCUMENTS)
    names = ["corpus.json", *[f"shard-{number:05d}.npy" for number in range(5)]]
    assert sorted(path.name for path in (tmp_path / "deep" / "work").iterdir()) == names

    heard = []
    found = encode_corpus(Counted(stop_before=0), DOCUMENTS, tmp_path / "deep" / "work", on_progress=heard.append, **SETTINGS)
    np.testing.assert_array_equal(found, EXPECTED)
    assert sum(heard) == len(DOCUMENTS)


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counted(stop_before=2), DOCUMENTS, tmp_path, **SETTINGS)
    encode = Counted()
    np.testing.assert_array_equal(encode_corpus(encode, DOCUMENTS, tmp_path, **SETTINGS), EXPECTED)
    assert [text for call in encode.calls for text in call] == [document.body for document in DOCUMENTS[10:]]


@pytest.mark.parametrize("damage", ["cut", "empty", "pickled", "shape", "dtype", "nan", "gone"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, damage: str) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, **SETTINGS)
    file = tmp_path / "shard-00001.npy"
    if damage in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[: 150 if damage == "cut" else 0])
    elif damage == "gone":
        file.unlink()
    else:
        shard = np.load(file)
        damaged = {"pickled": shard.astype(object), "shape": shard[:-1], "dtype": shard.astype(np.float64), "nan": shard * np.nan}
        np.save(file, damaged[damage], allow_pickle=True)
    encode = Counted()
    np.testing.assert_array_equal(encode_corpus(encode, DOCUMENTS, tmp_path, **SETTINGS), EXPECTED)
    assert encode.calls == [[document.body for document in DOCUMENTS[5:10]]]


@pytest.mark.parametrize(
    ("documents", "changed", "named"),
    [
        ((*DOCUMENTS[:-1], Document(doc_id="d22", title="", text="another")), {}, "corpus_hash"),
        (DOCUMENTS[:-1], {}, "corpus_hash, documents"),
        (DOCUMENTS, {"model_hash": "n"}, "model_hash"),
        (DOCUMENTS, {"max_tokens": 8}, "max_tokens"),
        (DOCUMENTS, {"shard_documents": 4}, "shard_documents"),
        (DOCUMENTS, {"dimension": 7}, "dimension"),
    ],
)
def test_vectors_of_something_else_are_refused(tmp_path: Path, documents: Sequence[Document], changed: dict[str, Any], named: str) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, **SETTINGS)
    with pytest.raises(UserError, match=rf"differs in {named}\); remove ") as caught:
        encode_corpus(Counted(), documents, tmp_path, **(SETTINGS | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("record", "named"), [(None, "missing, so nothing says"), ("{", "not valid JSON"), ("[]", "holds other vectors")])
def test_shards_that_nothing_describes_are_refused(tmp_path: Path, record: str | None, named: str) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, **SETTINGS)
    (tmp_path / "corpus.json").unlink() if record is None else (tmp_path / "corpus.json").write_text(record)
    with pytest.raises(UserError, match=named):
        encode_corpus(Counted(), DOCUMENTS, tmp_path, **SETTINGS)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        encode_corpus(Counted(), DOCUMENTS, tmp_path / "file" / "work", **SETTINGS)


def test_shards_of_a_model_are_its_vectors(tiny_model: LoadedModel, tmp_path: Path) -> None:
    graph, state = nnx.split(tiny_model.decoder)
    encoder = Encoder(graph, Prompter(tiny_model.tokenizer))

    def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        return encoder.encode(state, texts, max_tokens=9, on_progress=on_progress)

    titled = [dataclasses.replace(document, title=f"title {row}") for row, document in enumerate(DOCUMENTS)]
    found = encode_corpus(encode, titled, tmp_path, model_hash="m", max_tokens=9, dimension=64, shard_documents=8)
    # In other batches the products are summed up in another order.
    np.testing.assert_allclose(found, encode([document.body for document in titled]), atol=1e-6)
    assert json.loads((tmp_path / "corpus.json").read_text())["documents"] == 23
