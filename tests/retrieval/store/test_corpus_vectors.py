"""A corpus in shards: the same vectors in one go, after an interruption and after damage; another corpus or
model is refused."""

import dataclasses
import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.failing_disk import DISK_FULL, failing
from helpers.tiny_models import word_collection

from search_r3_jax.data.collection import Document
from search_r3_jax.errors import EmbeddingError, TransientError, UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.retrieval.store.corpus_vectors import EncodingSettings, Share, encode_corpus
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter

E = 6
DOCUMENTS = word_collection(documents=23, queries=1).documents
SETTINGS = EncodingSettings(model_hash="m", max_tokens=9, dimension=E, shard_documents=5)


class Counted:
    """A made-up encoder that remembers what it was given, and may be stopped before its next call."""

    def __init__(self, *, stop_before: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self._stop_before = stop_before

    def __call__(
        self, texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        if len(self.calls) == self._stop_before:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        if on_progress is not None:
            on_progress(len(texts))
        return vectors_of(texts)


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=E) for text in texts]).astype(
        np.float32
    )


EXPECTED = vectors_of([document.body for document in DOCUMENTS])


def test_vectors_in_order_from_shards_that_add_up(tmp_path: Path) -> None:
    encode, heard = Counted(), []
    found = encode_corpus(encode, DOCUMENTS, tmp_path / "deep" / "work", SETTINGS, on_progress=heard.append)
    np.testing.assert_array_equal(found, EXPECTED)
    assert (found.dtype, [len(call) for call in encode.calls]) == (np.float32, [5, 5, 5, 5, 3])
    assert sum(heard) == len(DOCUMENTS)
    names = ["corpus.json", *[f"shard-{number:05d}.npy" for number in range(5)], "vectors.npy"]
    assert sorted(path.name for path in (tmp_path / "deep" / "work").iterdir()) == names

    heard = []
    found = encode_corpus(
        Counted(stop_before=0), DOCUMENTS, tmp_path / "deep" / "work", SETTINGS, on_progress=heard.append
    )
    np.testing.assert_array_equal(found, EXPECTED)
    assert sum(heard) == len(DOCUMENTS)


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counted(stop_before=2), DOCUMENTS, tmp_path, SETTINGS)
    encode = Counted()
    np.testing.assert_array_equal(encode_corpus(encode, DOCUMENTS, tmp_path, SETTINGS), EXPECTED)
    assert [text for call in encode.calls for text in call] == [document.body for document in DOCUMENTS[10:]]


@pytest.mark.parametrize("damage", ["cut", "empty", "pickled", "shape", "dtype", "nan", "zeros", "gone"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, damage: str) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS)
    file = tmp_path / "shard-00001.npy"
    if damage in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[: 150 if damage == "cut" else 0])
    elif damage == "gone":
        file.unlink()
    else:
        shard = np.load(file)
        damaged = {
            "pickled": shard.astype(object),
            "shape": shard[:-1],
            "dtype": shard.astype(np.float64),
            "nan": shard * np.nan,
            # Of one document: no vector is zero.
            "zeros": np.where(np.arange(len(shard))[:, None] == 2, 0, shard),
        }
        np.save(file, damaged[damage], allow_pickle=True)
    encode = Counted()
    np.testing.assert_array_equal(encode_corpus(encode, DOCUMENTS, tmp_path, SETTINGS), EXPECTED)
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
        (DOCUMENTS, {"dtype": "bfloat16"}, "dtype"),
        (DOCUMENTS, {"documents_hash": "handed in"}, "corpus_hash"),
    ],
)
def test_vectors_of_something_else_are_refused(
    tmp_path: Path, documents: Sequence[Document], changed: dict[str, Any], named: str
) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS)
    with pytest.raises(UserError, match=rf"differs in {named}\); remove ") as caught:
        encode_corpus(Counted(), documents, tmp_path, dataclasses.replace(SETTINGS, **changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "named"),
    [(None, "missing, so nothing says"), ("{", "not valid JSON"), ("[]", "holds other vectors")],
)
def test_shards_that_nothing_describes_are_refused(tmp_path: Path, record: str | None, named: str) -> None:
    encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS)
    (tmp_path / "corpus.json").unlink() if record is None else (tmp_path / "corpus.json").write_text(record)
    with pytest.raises(UserError, match=named):
        encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        encode_corpus(Counted(), DOCUMENTS, tmp_path / "file" / "work", SETTINGS)


def test_bfloat16_takes_half_the_room(tmp_path: Path) -> None:
    encode = Counted()
    found = encode_corpus(encode, DOCUMENTS, tmp_path, dataclasses.replace(SETTINGS, dtype="bfloat16"))
    np.testing.assert_array_equal(found, EXPECTED.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(
        np.asarray(found[3:9], np.float32), EXPECTED[3:9].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert (tmp_path / "vectors.npy").stat().st_size == 128 + 23 * E * 2
    # A shard of float32 is none of these.
    np.save(tmp_path / "shard-00001.npy", EXPECTED[5:10])
    again = Counted()
    np.testing.assert_array_equal(
        encode_corpus(again, DOCUMENTS, tmp_path, dataclasses.replace(SETTINGS, dtype="bfloat16")), found
    )
    assert [len(call) for call in again.calls] == [5]


class Endless(Sequence[Document]):
    """Documents that are made when they are asked for, and only a shard of them at a time."""

    def __init__(self, length: int, most: int) -> None:
        self._length, self._most = length, most

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, at: Any) -> Any:
        rows = range(self._length)[at]
        assert isinstance(rows, range)
        assert len(rows) <= self._most
        return [Document(doc_id=f"d{row}", title="", text=str(row)) for row in rows]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    rows, dim, shard = 40_000, 256, 1000

    def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        # From 1 on: a vector of zeros has no direction.
        return np.repeat(1 + np.array(texts, np.float32)[:, None], dim, axis=1)

    tracemalloc.start()
    found = encode_corpus(
        encode,
        Endless(rows, shard),
        tmp_path,
        EncodingSettings(
            model_hash="m", max_tokens=9, dimension=dim, shard_documents=shard, documents_hash="h"
        ),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * dim * 4 / 4
    assert json.loads((tmp_path / "corpus.json").read_text())["corpus_hash"] == "h"
    np.testing.assert_array_equal(found[:, 0], 1 + np.arange(rows))
    np.testing.assert_array_equal(found[::999, -1], 1 + np.arange(rows)[::999])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_the_first_document_without_an_embedding_is_named(tmp_path: Path, value: float) -> None:
    def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        vectors = Counted()(texts)
        for row in (1, 2):
            vectors[row] = value
        return vectors

    with pytest.raises(EmbeddingError, match=f"document {DOCUMENTS[1].doc_id}: its embedding"):
        encode_corpus(encode, DOCUMENTS, tmp_path, SETTINGS)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_shards(tmp_path: Path, processes: int) -> None:
    encoders = [Counted() for _ in range(processes)]
    heard: list[list[int]] = [[] for _ in range(processes)]

    def run(process: int) -> np.ndarray:
        # Process 0 comes last: the others wait for its record.
        time.sleep(0.3 if process == 0 else 0)
        return encode_corpus(
            encoders[process],
            DOCUMENTS,
            tmp_path,
            SETTINGS,
            share=Share(process=process, processes=processes, wait_seconds=20),
            on_progress=heard[process].append,
        )

    with ThreadPoolExecutor(processes) as pool:
        for found in pool.map(run, range(processes)):
            np.testing.assert_array_equal(found, EXPECTED)
    for process, encoder in enumerate(encoders):
        bodies = [[document.body for document in DOCUMENTS[start : start + 5]] for start in range(0, 23, 5)]
        assert encoder.calls == bodies[process::processes]
    assert sum(heard[0]) == 23


def test_a_process_that_does_not_come_is_missed(tmp_path: Path) -> None:
    zero, one = (Share(process=process, processes=2, wait_seconds=0.1) for process in (0, 1))
    with pytest.raises(
        TransientError, match=r"corpus.json: has not come for 0\.1 seconds; see that process 0 runs"
    ):
        encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS, share=one)
    with pytest.raises(TransientError, match=r"shard-00001\.npy: has not come .* process 1 runs"):
        encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS, share=zero)
    assert not (tmp_path / "vectors.npy").exists()
    with pytest.raises(TransientError, match=r"vectors\.npy: has not come .* process 0 runs"):
        encode_corpus(Counted(), DOCUMENTS, tmp_path, SETTINGS, share=one)
    np.testing.assert_array_equal(
        encode_corpus(Counted(stop_before=0), DOCUMENTS, tmp_path, SETTINGS, share=zero), EXPECTED
    )
    np.testing.assert_array_equal(
        encode_corpus(Counted(stop_before=0), DOCUMENTS, tmp_path, SETTINGS, share=one), EXPECTED
    )
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="process 2 of 2"):
        Share(process=2, processes=2)


@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(tmp_path: Path, at: int) -> None:
    with failing(at, DISK_FULL, writes_only=True), pytest.raises(UserError, match="No space left on device"):
        encode_corpus(Counted(), DOCUMENTS, tmp_path / "work", SETTINGS)
    assert not list(tmp_path.rglob(".*.tmp"))
    np.testing.assert_array_equal(encode_corpus(Counted(), DOCUMENTS, tmp_path / "work", SETTINGS), EXPECTED)


def test_shards_of_a_model_are_its_vectors(tiny_model: LoadedModel, tmp_path: Path) -> None:
    graph, state = nnx.split(tiny_model.decoder)
    encoder = Encoder(graph, Prompter(tiny_model.tokenizer))

    def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        return encoder.encode(state, texts, max_tokens=9, on_progress=on_progress)

    titled = [dataclasses.replace(document, title=f"title {row}") for row, document in enumerate(DOCUMENTS)]
    settings = EncodingSettings(model_hash="m", max_tokens=9, dimension=64, shard_documents=8)
    found = encode_corpus(encode, titled, tmp_path, settings)
    # In other batches the products are summed up in another order.
    np.testing.assert_allclose(found, encode([document.body for document in titled]), atol=1e-6)
    assert json.loads((tmp_path / "corpus.json").read_text())["documents"] == 23
