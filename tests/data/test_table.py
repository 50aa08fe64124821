"""Tables with a row per query and answer: every kind of file says the same."""

import csv
import gzip
import io
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow
import pytest
from helpers.command_line import search_r3_here
from helpers.tables import QA, ROWS, build, save_datasets
from pyarrow import parquet

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import TransientError, UserError

LION, CAT = "Ein Löwe schnurrt nicht.", 'A cat;\n\npurrs, it "does".'
JUDGED = {("what purrs", CAT, 2), ("what purrs", LION, 1), ("what purrs", "Dogs bark.", 0)} | {
    ("what barks", "Dogs bark.", 1)
}


def judged(collection: Collection) -> set[tuple[str, str, int]]:
    """(query, document, relevance), 0 for a negative."""
    body = {document.doc_id: document.body for document in collection.documents}
    return {
        (query.text, body[doc_id], relevance)
        for query in collection.queries
        for doc_id, relevance in [*query.positives.items(), *((each, 0) for each in query.negatives)]
    }


def csv_text(separator: str = ",", end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*ROWS[0]], delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def save_parquet(file: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


WRITTEN: dict[str, Callable[[Path], object]] = {
    "t.csv": lambda file: file.write_text(csv_text()),
    "semicolons.csv": lambda file: file.write_text(csv_text(";")),
    "bars.csv": lambda file: file.write_text(csv_text("|")),
    "tabs.csv": lambda file: file.write_text(csv_text("\t")),
    "t.tsv": lambda file: file.write_text(csv_text("\t")),
    "commas.tab": lambda file: file.write_text(csv_text(",")),
    "windows.CSV": lambda file: file.write_bytes(b"\xef\xbb\xbf" + csv_text(end="\r\n").encode()),
    "blanks.csv": lambda file: file.write_text("\n" + csv_text().replace("\nwhat", "\n\n\nwhat") + "\n\n"),
    "zipped.csv.gz": lambda file: file.write_bytes(gzip.compress(csv_text().encode())),
    "t.jsonl": lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "zipped.jsonl.gz": lambda file: file.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    ),
    "t.parquet": save_parquet,
    "saved": save_datasets,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_file_says_the_same(tmp_path: Path, name: str) -> None:
    WRITTEN[name](tmp_path / name)
    built = build(tmp_path / name, tmp_path / "out", *QA, "negative=bad", "relevance=score")
    collection = load_collection(tmp_path / "out", "train")
    assert collection == built.collections["train"]
    assert judged(collection) == JUDGED
    # Equal texts are one document, equal queries one query.
    assert (len(collection.documents), len(collection.queries), built.content.rows) == (3, 2, 3)
    assert collection.name == name.split(".")[0]


@pytest.mark.slow
def test_a_table_of_many_rows_is_what_pandas_reads(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["a,b", 'c "d"', "e;f", "two\nlines", "é", "'x'", "\u2028", "=1", "tab\tbed"]
    rows = [
        {
            "n": number,
            "q": f"{draw.choice(words)} {draw.randrange(80)}",
            "a": f"{draw.choice(words)} {draw.choice(words)} {draw.randrange(200)}",
            "grade": draw.choice([0, 1, 3]),
        }
        for number in range(10_000)
    ]
    frame = pandas.DataFrame(rows).drop_duplicates(["q", "a"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t", quoting=csv.QUOTE_ALL)
    frame.to_parquet(tmp_path / "t.parquet")
    read = pandas.read_csv(tmp_path / "t.csv")
    answered = set(read[read.grade > 0].q)
    # U+2028 is a space too.
    expected = {
        (query.strip(), answer.strip(), grade)
        for query, answer, grade in zip(read.q, read.a, read.grade, strict=True)
        if query in answered
    }
    fields = ("query=q", "positive=a", "relevance=grade")
    for name in ("t.csv", "t.tsv", "t.parquet"):
        built = build(tmp_path / name, tmp_path / f"{name}.set", *fields)
        assert judged(built.collections["train"]) == expected
        assert built.content.rows == len(frame)
        assert len(built.collections["train"].documents) == read.a.nunique()


def test_columns_with_our_names_need_no_fields(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "Query,positive,title,split,query_id,doc_id,note\n"
        "q one,text a,Title,train,7,d1,x\n"
        "q one,text b,,train,7,d2,x\n"
        "q two,text a,Title,dev,8,d1,x\n"
        "q two,text c,,dev,8,d9,x\n"
    )
    built = build(file, tmp_path / "out")
    assert list(built.collections) == ["dev", "train"]
    assert built.columns.startswith("query=Query positive=positive title=title doc_id=doc_id split=split")
    train, dev = built.collections["train"], built.collections["dev"]
    assert train.documents == dev.documents
    assert [(each.doc_id, each.body) for each in train.documents] == [
        ("d1", "Title\ntext a"),
        ("d2", "text b"),
        ("d9", "text c"),
    ]
    assert train.qrels() == {"7": {"d1": 1, "d2": 1}}
    assert dev.qrels() == {"8": {"d1": 1, "d9": 1}}


def test_equal_queries_and_documents_are_one_under_their_first_id(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("query,positive,query_id,doc_id\nq,a,1,d1\nq ,b,2,d2\nq, a,3,d3\nr,b,4,d2\n")
    collection = build(file, tmp_path / "out").collections["train"]
    assert collection.qrels() == {"1": {"d1": 1, "d2": 1}, "4": {"d2": 1}}
    assert [document.doc_id for document in collection.documents] == ["d1", "d2"]


def test_lists_and_several_columns_of_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": ["a", "b"], "n1": "c", "n2": ["d", "e"]},
        {"query": "r", "positive": "e"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ("query=query", "positive=positive", "negative=n1", "negative=n2")
    collection = build(tmp_path / "t.jsonl", tmp_path / "out", *fields).collections["train"]
    assert judged(collection) == {
        *(("q", text, 1) for text in "ab"),
        *(("q", text, 0) for text in "cde"),
        ("r", "e", 1),
    }


def test_typed_columns_with_gaps(tmp_path: Path) -> None:
    """Ids with gaps are floats in pandas, labels are booleans, missing texts are NaN or None."""
    frame = pandas.DataFrame(
        {
            "query": ["q", "q", "r"],
            "positive": ["a", "b", "c"],
            "negative": [None, float("nan"), "a"],
            "relevance": [True, False, True],
            "doc_id": [1.0, 2.0, 3.0],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False, na_rep="NaN")
    for name in ("t.parquet", "t.csv"):
        collection = build(tmp_path / name, tmp_path / f"{name}.set").collections["train"]
        assert judged(collection) == {("q", "a", 1), ("q", "b", 0), ("r", "c", 1), ("r", "a", 0)}
        ids = ["1", "2", "3"] if name == "t.parquet" else ["1.0", "2.0", "3.0"]
        assert [document.doc_id for document in collection.documents] == ids


def test_a_query_that_nothing_is_relevant_to_is_left_out_and_its_documents_stay(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("query,positive,relevance\nq,a,1\nr,b,0\nr,c,-1\n")
    built = build(tmp_path / "t.csv", tmp_path / "out")
    assert (judged(built.collections["train"]), built.content.unanswered) == ({("q", "a", 1)}, 1)
    assert [document.text for document in built.collections["train"].documents] == ["a", "b", "c"]


def test_the_splits_of_a_data_set_stay(tmp_path: Path) -> None:
    import datasets

    parts = {"train": ROWS[:2], "validation": ROWS[2:]}
    made = [(name, datasets.Dataset.from_list(rows)) for name, rows in parts.items()]
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    built = build(tmp_path / "saved", tmp_path / "out", *QA)
    assert {split: len(each.queries) for split, each in built.collections.items()} == {
        "train": 2,
        "validation": 1,
    }
    assert built.collections["train"].documents == built.collections["validation"].documents
    with pytest.raises(UserError, match=r"--split-test: .*saved has splits of its own; leave the flag out"):
        build(tmp_path / "saved", tmp_path / "more", *QA, shares={"test": 0.5})


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(hub_id: str, **options: object) -> datasets.DatasetDict:
        asked.append((hub_id, options))
        return datasets.DatasetDict([("train", datasets.Dataset.from_list(ROWS))])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    built = build(Path("someone/pairs:small"), tmp_path / "out", *QA, "negative=bad", "relevance=score")
    assert asked == [("someone/pairs", {"name": "small"})]
    assert (judged(built.collections["train"]), built.collections["train"].name) == (JUDGED, "pairs")

    def refusing(error: Exception) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise error

        return refuse

    # A hub that does not answer may answer tomorrow; a data set that is not there will not be.
    for error, kind, message in (
        (
            socket.gaierror("nobody\nanswers"),
            TransientError,
            r"and the hub cannot be reached \(nobody answers\)",
        ),
        (ValueError("no\nsuch"), UserError, r"no such file, and .* can be read \('no such'\); give a"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", refusing(error))
        with pytest.raises(kind, match=rf"a/b: .*{message}") as caught:
            build(Path("a/b"), tmp_path / "more")
        assert "\n" not in str(caught.value)
    # A mistyped path is not looked up.
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    for name in ("data/pairs", "pairs.csv", "./pairs", "/pairs", "a/b/c"):
        with pytest.raises(UserError, match="no such file"):
            build(Path(name), tmp_path / "more")


def test_the_command_says_what_it_built(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text("question;answer\n" + "".join(f'how {n};"so\n{n}"\n' for n in range(20)))
    out = tmp_path / "faq"
    command = ["data", "build", "--source", "table", "--input", str(file), "--out", str(out)]
    shown = search_r3_here(*command)
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    proposed = shown.stderr.strip().split("say which they are: ")[1].split()
    assert proposed == ["--fields", "query=question", "positive=answer"]
    options = [*proposed, "--split-test", "0.1", "--split-dev", "0.2", "--seed", "3"]
    shown = search_r3_here(*command, *options)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[:4] == [
        f"{file}: 20 rows, query=question positive=answer, separated by ';'",
        f"{out}: dev: 4 queries over 20 documents",
        f"{out}: test: 2 queries over 20 documents",
        f"{out}: train: 14 queries over 20 documents",
    ]
    first = load_collection(out, "train").queries[0]
    assert lines[4:6] == ["example 1 of train:", f"  query     {first.text!r}"]
    assert sum(line.startswith("  positive  'so\\n") for line in lines) == 2
    # Again: the same data set; with another seed another one, which does not replace it.
    assert search_r3_here(*command, *options).stdout == shown.stdout
    other = search_r3_here(*command, *options[:-1], "4")
    assert (other.returncode, "holds another data set" in other.stderr) == (2, True)
    source = json.loads((out / "dataset.json").read_text())["source"]
    assert source == {
        "kind": "table",
        "fields": {"query": ["question"], "positive": ["answer"]},
        "held_out": {"test": 0.1, "dev": 0.2},
        "seed": 3,
    }
