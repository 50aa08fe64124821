"""Tables with a row per query and answer: every kind of file says the same, and bad rows leave no trace."""

import csv
import gzip
import io
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from helpers.command_line import search_r3_here
from pyarrow import parquet

from search_r3_jax.data.build import BuiltTable, TableOptions, build_table
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import UserError

QA = ("query=question", "positive=answer")
ROWS = [
    {"question": " what purrs ", "answer": 'A cat;\n\npurrs, it "does".', "bad": "Dogs bark.", "score": 2},
    {"question": "what barks", "answer": "Dogs bark.", "bad": None, "score": 1},
    {"question": "what purrs", "answer": "Ein Löwe schnurrt nicht. \t", "bad": "", "score": 1},
]
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


def build(source: Path, out: Path, *fields: str, skip_bad: bool = False, **options: Any) -> BuiltTable:
    table = TableOptions(fields=fields, **options)
    return build_table(source, out, options=table, skip_bad=skip_bad)


def csv_text(separator: str = ",", end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*ROWS[0]], delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def save_datasets(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder)


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

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror("nobody\nanswers")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"a/b: no such file, and .*nobody answers.*; give a") as caught:
        build(Path("a/b"), tmp_path / "more")
    assert "\n" not in str(caught.value)
    # A mistyped path is not looked up.
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    for name in ("data/pairs", "pairs.csv", "./pairs", "/pairs", "a/b/c"):
        with pytest.raises(UserError, match="no such file"):
            build(Path(name), tmp_path / "more")


HEADER = "question,answer,bad,score\n"
GRADED = (*QA, "relevance=score")
# (row, columns, the error, what --skip-bad counts; None where it does not help)
GOOD = "what,yes,no,1\n"
BAD: list[tuple[bytes, tuple[str, ...], str, str | None]] = [
    (b",a,b,1\n", QA, "t.csv, line 3: field 'question' is empty", "empty text"),
    (b"q, ,b,1\n", QA, "t.csv, line 3: field 'answer' is empty; fill it or remove", "empty text"),
    (b"q,NaN,b,1\n", QA, "line 3: field 'answer' is 'NaN', which stands for a missing", "empty text"),
    (b"q,a\n", QA, "t.csv, line 3: 2 cells, and 4 columns", "wrong number of fields"),
    (b"q,a,b,1,2\n", QA, "t.csv, line 3: 5 cells, and 4 columns", "wrong number of fields"),
    (b"q,a\0,b,1\n", QA, "line 3: field 'answer' holds a NUL byte", "NUL byte"),
    (b"q,\xe9,b,1\n", QA, "line 3: field 'answer' is not UTF-8", "not UTF-8"),
    (b'q,"a"b,c,1\n', QA, "line 3: text behind a closing quote", "bad quotes"),
    (b'q,"a\nb"c,c,1\n', QA, "t.csv, lines 3 to 4: text behind a closing quote", "bad quotes"),
    (b"q,a\rb,c,1\n", QA, "line 3: a carriage return outside of quotes", "bad line end"),
    (b"q,a,b,high\n", GRADED, "line 3: field 'score' must be a whole", "bad relevance"),
    (b"q,a,b,0.5\n", GRADED, "line 3: field 'score' must be a whole", "bad relevance"),
    (b"q,a,b,\n", GRADED, "field 'score' must be a whole number", "bad relevance"),
    (b"q,a,b,9999999999\n", GRADED, "field 'score' must be", "bad relevance"),
    (
        b"q,a,a,1\n",
        (*QA, "negative=bad"),
        "line 3: a document of this query is judged twice",
        "contradictory judgement",
    ),
    (b"what,yes,b,2\n", GRADED, "judged twice, 1 and 2", "contradictory judgement"),
    (b"q,a,b,1\n", (*QA, "query_id=score"), "'query_id': '1' stood for another text", "duplicate id"),
    (b"q,a,b,1\n", (*QA, "doc_id=score"), "'doc_id': '1' stood for another text", "duplicate id"),
    (b"q,a,,1\n", (*QA, "doc_id=bad"), "line 3: field 'bad' is empty", "empty text"),
    (b"q,a,all,1\n", (*QA, "split=bad"), "line 3: split 'all' is not usable", "bad split name"),
    (b'q,"a,b,1\nx,y,z,1\n', QA, "lines 3 to 4: a quote is opened and never closed", None),
]


@pytest.mark.parametrize(("row", "fields", "message", "reason"), BAD, ids=[each[2] for each in BAD])
def test_a_bad_row_is_named_or_leaves_no_trace(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: bytes,
    fields: tuple[str, ...],
    message: str,
    reason: str | None,
) -> None:
    name = "t.csv"
    good, rest = f"{HEADER}{GOOD}".encode(), b"how,so,maybe,5\n"
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / name).write_bytes(good + rest)
    expected = build(tmp_path / "good" / name, tmp_path / "expected", *fields)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_bytes(good + row + (b"" if reason is None else rest))
    with pytest.raises(UserError) as caught:
        build(tmp_path / "bad" / name, tmp_path / "bad" / "out", *fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "bad").iterdir()] == [name]
    capsys.readouterr()
    if reason is not None:
        skipped = build(tmp_path / "bad" / name, tmp_path / "bad" / "out", *fields, skip_bad=True)
        assert skipped.collections == expected.collections
        assert capsys.readouterr().err == f"skipped: {caught.value}\nskipped 1 in all: {reason} 1\n"


TYPED = [
    ({"query": 3, "positive": "a"}, "row 1: field 'query' must be a string, got int"),
    ({"query": "q", "positive": 1.5}, "row 1: field 'positive' must be a string, got float"),
    ({"query": "q", "positive": float("nan")}, "row 1: field 'positive' is empty"),
    ({"query": "q", "positive": None}, "row 1: field 'positive' is empty"),
    ({"query": "q", "positive": []}, "row 1: field 'positive' is empty"),
    ({"query": "q", "positive": ["a", ""]}, "row 1: field 'positive[1]' is empty"),
    ({"query": "q", "positive": {"text": "a"}}, "row 1: field 'positive' must be a string, got dict"),
    ({"query": "q", "positive": ["a", "b"], "title": "t"}, "row 1: field 'positive' holds 2 documents"),
    ({"query": b"q", "positive": "a"}, "row 1: field 'query' must be a string, got bytes"),
]


@pytest.mark.parametrize(("row", "message"), TYPED, ids=[message for _, message in TYPED])
def test_a_bad_cell_of_a_typed_table_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    with pytest.raises(UserError) as caught:
        build(tmp_path / "t.parquet", tmp_path / "out")
    assert message in str(caught.value)
    if isinstance(row["query"], bytes):
        return
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        build(tmp_path / "t.jsonl", tmp_path / "out")
    assert message.replace("row 1", "line 1") in str(caught.value)


UNUSABLE: list[tuple[str, bytes | None, tuple[str, ...], str]] = [
    (
        "t.csv",
        b"id,question,the answer\n1,q,a\n",
        (),
        "which they are: --fields query=question 'positive=the answer'",
    ),
    (
        "t.csv",
        b"id,x,y\n1,q,a\n",
        (),
        "t.csv: no column query and no column positive; the columns are id, x, y; say",
    ),
    (
        "t.csv",
        b"query,x\nq,a\n",
        (),
        "the columns are query, x; say which they are: --fields query=query positive=COLUMN",
    ),
    (
        "t.csv",
        b"question,answer\nq,a\n",
        ("query=qestion", "positive=answer"),
        "query=qestion: no such column; did you mean question?",
    ),
    ("t.csv", b"question,answer,answer\nq,a,b\n", QA, "2 columns are called 'answer'"),
    (
        "t.csv",
        b"question,answer\nq,a\n",
        ("query=question",),
        "--fields: positive missing; add positive=COLUMN",
    ),
    ("t.csv", b"question,answer\nq,a\n", ("question",), "--fields: 'question': give NAME=COLUMN"),
    ("t.csv", b"question,answer\nq,a\n", (*QA, "relevnce=answer"), "did you mean relevance?"),
    (
        "t.csv",
        b"question,answer\nq,a\n",
        (*QA, "color=answer"),
        "nothing that a column can be; the names are query,",
    ),
    ("t.csv", b"question,answer\nq,a\n", (*QA, "query=answer"), "--fields: query is given twice"),
    ("t.csv", b"question,answer\n", QA, "no row with a query and a document relevant to it"),
    ("t.csv", b"\n \n", QA, "t.csv: is empty"),
    ("t.csv", b"question,answer\rq,a\r", QA, "t.csv: lines end in carriage returns alone"),
    ("t.csv", "question,answer\nq,a\n".encode("utf-16"), QA, "t.csv: not UTF-8; convert the file"),
    ("t.csv", b'"question,answer\nq,a\n', QA, "a quote is opened and never closed"),
    ("t.csv.gz", b"question,answer\n", QA, "damaged gzip file"),
    ("t.xlsx", b"", QA, "t.xlsx: is no table; give a .csv"),
    ("t.parquet", b"PAR1", QA, "t.parquet: cannot be read as Parquet ("),
    ("t.parquet", b"", QA, "t.parquet: cannot be read as Parquet ("),
    ("t.parquet.gz", b"", QA, "t.parquet.gz: is no table"),
    ("t.jsonl", b"", QA, "t.jsonl: has no columns"),
    ("t.jsonl", b"[1]\n", QA, "t.jsonl, line 1: expected a JSON object"),
    ("none.csv", None, QA, "--input: {folder}/none.csv: no such file; give a .csv"),
    ("none", None, QA, "--input: {folder}/none: no such file or folder; give a .csv"),
    (".", None, QA, "--input: {folder}: is no table"),
]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"), UNUSABLE, ids=[each[3] for each in UNUSABLE]
)
def test_what_is_no_usable_table_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, fields: tuple[str, ...], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = list(tmp_path.iterdir())
    for skip_bad in (False, True):
        with pytest.raises(UserError) as caught:
            build(tmp_path / name, tmp_path / "out", *fields, skip_bad=skip_bad)
        if not skip_bad:
            assert message.replace("{folder}", str(tmp_path)) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == before


def test_a_damaged_data_set_is_one_line(tmp_path: Path) -> None:
    save_datasets(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(UserError, match="saved: cannot be read by datasets") as caught:
        build(tmp_path / "saved", tmp_path / "out", *QA)
    assert "\n" not in str(caught.value)


SHARES = [
    ({"test": 0.0}, "--split-test: 0: give a share between 0 and 1"),
    ({"test": 1.0}, "--split-test: 1: give a share"),
    ({"dev": float("nan")}, "--split-dev: nan: give a share"),
    ({"test": 0.5, "dev": 0.5}, "--split-test, --split-dev: 1 in all leaves nothing to train on"),
    ({"test": 0.4}, "--split-test: 0.4: cannot be held out of 3 queries: .* at least 3"),
]


@pytest.mark.parametrize(("shares", "message"), SHARES)
def test_shares_that_cannot_be_held_out(tmp_path: Path, shares: dict[str, float], message: str) -> None:
    (tmp_path / "t.csv").write_text("query,positive\na,yes\nb,yes\nc,Yes \n")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "t.csv", tmp_path / "out", shares=shares)
    (tmp_path / "split.csv").write_text("query,positive,split\na,yes,train\n")
    with pytest.raises(UserError, match="leave the flag out, or name the other columns with --fields"):
        build(tmp_path / "split.csv", tmp_path / "out", shares={"test": 0.1})
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("flag", [["--fields", "query=a"], ["--split-test", "0.1"], ["--split-dev", "0.1"]])
def test_flags_of_tables_are_for_tables(tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "q", "positive": "a"}\n')
    command = ["data", "build", "--source", "jsonl", "--input", str(tmp_path / "t.jsonl")]
    shown = search_r3_here(*command, "--out", str(tmp_path / "out"), *flag)
    line = f"search-r3: {flag[0]}: is for --source table; leave it out\n"
    assert (shown.returncode, shown.stderr) == (2, line)
