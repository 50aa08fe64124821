"""Mistakes in tables: each is one line, and bad rows leave no trace."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers.command_line import search_r3_here
from helpers.tables import QA, build, save_datasets
from pyarrow import parquet

from search_r3_jax.errors import UserError

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


@pytest.mark.parametrize("flag", [["--fields", "query=a"], ["--split-test", "0.1"], ["--split-dev", "0.1"]])
def test_flags_of_tables_are_for_tables(tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "q", "positive": "a"}\n')
    command = ["data", "build", "--source", "jsonl", "--input", str(tmp_path / "t.jsonl")]
    shown = search_r3_here(*command, "--out", str(tmp_path / "out"), *flag)
    line = f"search-r3: {flag[0]}: is for --source table; leave it out\n"
    assert (shown.returncode, shown.stderr) == (2, line)
