"""Texts with ids into `embed`, vectors with ids out of it; and what `think` shows."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from search_r3_jax.commands.models import Embed, Think
from search_r3_jax.commands.vector_files import read_texts, writer_of
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError

DOCUMENTS = [
    {"_id": "d1", "title": "A title", "text": "a text\u2028with a separator"},
    {"_id": "d2", "title": "", "text": "another"},
    {"_id": "d3", "title": "Öl", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "what"}, {"_id": "q2", "text": "never judged"}]


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return folder


def test_a_beir_folder_gives_what_evaluation_reads(beir: Path) -> None:
    collection = load_collection(beir, "test")
    documents, queries = read_texts(beir, "document"), read_texts(beir, "query")
    assert list(documents.ids) == ["d1", "d2", "d3"]
    assert list(documents.texts) == [document.body for document in collection.documents]
    assert documents.texts[0] == "A title\na text\u2028with a separator"
    assert dict(zip(queries.ids, queries.texts, strict=True)) == {"q1": "what", "q2": "never judged"}


def test_a_built_data_set_gives_what_evaluation_reads(tmp_path: Path) -> None:
    def split(name: str, query: str, documents: tuple[Document, ...]) -> Collection:
        queries = (Query(query_id=f"q {name}", text=query, positives={"d": 1}, instruction="Find it"),)
        return Collection(name="made", split=name, documents=documents, queries=queries)

    shared = (Document(doc_id="d", title="T", text="a text"), Document(doc_id="e", title="", text="b"))
    splits = {name: split(name, f"what {name}", shared) for name in ("train", "test")}
    built = build_dataset(splits, tmp_path / "shared", name="made", source={"kind": "test"})
    assert vars(read_texts(built, "document")) == {"ids": ["d", "e"], "texts": ["T\na text", "b"]}
    queries = read_texts(built, "query")
    assert sorted(queries.ids) == ["q test", "q train"]
    assert "Instruct: Find it\nQuery: what test" in queries.texts
    assert list(read_texts(built, "query", "test").ids) == ["q test"]
    with pytest.raises(UserError, match="no split 'dev'"):
        read_texts(built, "query", "dev")

    other = split("test", "what", (Document(doc_id="d", title="", text="another text"),))
    built = build_dataset(splits | {"test": other}, tmp_path / "own", name="made", source={"kind": "test"})
    assert list(read_texts(built, "document", "test").texts) == ["another text"]
    with pytest.raises(UserError, match=r"id 'd' names one text in a split .*--split \(test, train\)"):
        read_texts(built, "document")


def test_a_split_of_what_has_none_is_refused(beir: Path, tmp_path: Path) -> None:
    assert list(read_texts(beir, "query", "test").ids) == ["q1"]
    (tmp_path / "a.txt").write_text("a text\n")
    with pytest.raises(UserError, match=r"--split: .*a\.txt has no splits"):
        read_texts(tmp_path / "a.txt", "query", "test")


def test_lines_of_objects_have_ids_and_titles(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in DOCUMENTS)
    found = read_texts(file, "document")
    assert (list(found.ids), list(found.texts)[1]) == (["d1", "d2", "d3"], "another")
    (tmp_path / "numbers.jsonl").write_text('{"id": 7, "text": "a"}\n\n{"text": "b"}\n')
    assert list(read_texts(tmp_path / "numbers.jsonl", "query").ids) == ["7", "2"]
    (tmp_path / "twice.jsonl").write_text('{"id": "a", "text": "a"}\n{"id": "a", "text": "b"}\n')
    with pytest.raises(UserError, match=r"twice\.jsonl, line 2: id 'a' is there already"):
        read_texts(tmp_path / "twice.jsonl", "query")


def test_standard_input_gives_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO("\ufeffone\r\n\ntwo Öl".encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    found = read_texts(Path("-"), "query")
    assert (list(found.ids), list(found.texts)) == (["1", "2", "3"], ["one", "", "two Öl"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        read_texts(Path("-"), "query")


def read_back(file: Path) -> tuple[list[str], np.ndarray]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["ids"].tolist(), arrays["vectors"]
    if file.suffix == ".parquet":
        import pandas

        table = pandas.read_parquet(file)
        return table["id"].tolist(), np.stack(table["vector"].tolist())
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [record["id"] for record in records], np.array([record["vector"] for record in records])


@pytest.mark.parametrize("kind", ["npz", "parquet", "jsonl"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_vectors_come_back_bit_by_bit_with_their_ids(tmp_path: Path, kind: str, dtype: str) -> None:
    generator = np.random.default_rng(0)
    vectors = (generator.standard_normal((20, 6)) * 100 + 100).clip(0, 120).astype(dtype)
    ids = [f'id {i} Öl "quoted"' for i in range(20)]
    file = tmp_path / f"out.{kind}"
    writer_of(file, ids)(file, vectors)
    found_ids, found = read_back(file)
    assert found_ids == ids
    np.testing.assert_array_equal(found.astype(dtype), vectors)


def test_embed_writes_ids_and_thoughts(tiny_folders: dict[str, Path], tmp_path: Path, beir: Path) -> None:
    model = str(tiny_folders["llama"])
    options: dict[str, Any] = {"model": model, "input": beir, "mode": "reason", "max_think_tokens": 4}
    Embed(**options, out=tmp_path / "out.npz", thoughts=tmp_path / "thoughts.jsonl").run()
    embedder = Embedder.load(model, max_think_tokens=4)
    expected = embedder.think([query["text"] for query in QUERIES])
    ids, vectors = read_back(tmp_path / "out.npz")
    assert ids == ["q1", "q2"]
    np.testing.assert_array_equal(vectors, [thought.vector for thought in expected])
    told = [json.loads(line) for line in (tmp_path / "thoughts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in told] == ids
    assert [line["text"] for line in told] == [query["text"] for query in QUERIES]
    assert [(line["thought"], line["valid"], line["tokens"]) for line in told] == [
        (thought.text, thought.valid, thought.tokens) for thought in expected
    ]


def test_vectors_are_written_where_thoughts_cannot_be(
    tiny_folders: dict[str, Path], tmp_path: Path, beir: Path
) -> None:
    command = Embed(
        model=str(tiny_folders["llama"]),
        input=beir,
        mode="reason",
        max_think_tokens=4,
        out=tmp_path / "out.npz",
        thoughts=Path("/dev/full"),
    )
    with pytest.raises(UserError, match="--thoughts: /dev/full: cannot be written"):
        command.run()
    assert read_back(tmp_path / "out.npz")[1].shape[0] == len(QUERIES)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"thoughts": Path("t.jsonl")}, "--thoughts: nothing is thought in mode direct"),
        ({"max_think_tokens": 3}, "--max-think-tokens: nothing is thought in mode direct"),
        ({"mode": "reason", "max_think_tokens": -1}, "--max-think-tokens: -1: give 0 or more"),
        ({"mode": "reason", "thoughts": Path("out.npy")}, "--thoughts: out.npy: is --out too"),
        ({"precision": "int8"}, "--precision: int8: one text has no range"),
        ({"out": Path("out.csv")}, r"--out: out\.csv: no vectors are written as \.csv"),
        ({"input": Path("faq.csv")}, r"--input: faq\.csv: is a table"),
        ({"input": Path("faq.TSV.gz")}, r"--input: faq\.TSV\.gz: is a table"),
        ({"input": Path("faq.json")}, r"--input: faq\.json: is JSON; name it \.jsonl"),
    ],
)
def test_mistakes_are_found_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a text\n")
    with pytest.raises(UserError, match=named):
        Embed(**({"model": "nowhere", "input": Path("texts.txt"), "out": Path("out.npy")} | options)).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]


@pytest.mark.parametrize("kind", ["query", "document"])
def test_an_empty_file_gives_no_vectors(
    tiny_folders: dict[str, Path], tmp_path: Path, kind: Literal["query", "document"]
) -> None:
    (tmp_path / "none.txt").write_text("")
    Embed(
        model=str(tiny_folders["llama"]), input=tmp_path / "none.txt", out=tmp_path / "o.npy", kind=kind
    ).run()
    assert np.load(tmp_path / "o.npy").shape == (0, 64)


def test_think_shows_the_thought_of_each_query(
    tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folders["llama"])
    Think(model=model, queries=("how to [sort]", "x"), max_think_tokens=4).run()
    shown = capsys.readouterr().out
    thought = Embedder.load(model, max_think_tokens=4).think("how to [sort]")
    how = "embeds by itself" if thought.valid else "was made to embed"
    assert shown.startswith(f"how to [sort]  ({thought.tokens} tokens, {how})\n")
    with pytest.raises(UserError, match="queries: none"):
        Think(model="nowhere", queries=()).run()
    with pytest.raises(UserError, match="--max-tokens: 0"):
        Think(model="nowhere", queries=("a",), max_tokens=0).run()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ('"x"', "x"),
        ("7", "7"),
        ("null", "1"),
        ("true", "must be a string, got bool"),
        ('{"a": 1}', "must be a string, got dict"),
        ("[1]", "must be a string, got list"),
        ("1.5", "must be a string, got float"),
        ('""', "field '_id' is empty"),
        ('"a\\u0000"', "field '_id' holds a NUL byte"),
        ('"\\ud800x"', "field '_id' holds an unpaired surrogate"),
    ],
)
def test_an_id_is_a_string_or_a_whole_number(tmp_path: Path, field: str, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"_id": {field}, "title": null, "text": "b"}}\n')
    if "field" in expected or "got" in expected:
        with pytest.raises(UserError, match=f"a.jsonl, line 1: .*{expected}"):
            read_texts(file, "document")
    else:
        assert (read_texts(file, "document").ids, read_texts(file, "document").texts) == ([expected], ["b"])


def test_a_closed_standard_input_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--input: -: standard input is closed"):
        read_texts(Path("-"), "query")
