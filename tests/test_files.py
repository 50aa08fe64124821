import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.data.dataset import ordered_queries_hash
from search_r3_jax.data.jsonl import read_jsonl
from search_r3_jax.data.subsample import sample_corpus, unordered_documents_hash, unordered_queries_hash
from search_r3_jax.files import (
    append_json_line,
    digest_of,
    read_json_lines,
    replacing,
    write_array,
    write_bytes,
    write_json_lines,
)
from search_r3_jax.lines import Problems

DOCUMENTS = (
    Document(doc_id="d1", title="A title", text="Körper"),
    Document(doc_id="d2", title="", text="b"),
)
QUERIES = (
    Query(query_id="q1", text="what?", positives={"d2": 2, "d1": 1}, instruction="i", reasoning="r"),
    Query(query_id="q2", text="ü", positives={"d1": 1}, negatives=("d2",)),
)
COLLECTION = Collection(name="n", split="s", documents=DOCUMENTS, queries=QUERIES)
IDS_HASH = "62c53be106927198d9aa55a536241b4af810be8e9fe0d0ac0bf741d22f224365"


def test_hashes_on_disk_stay_what_they_are(tmp_path: Path) -> None:
    """Data sets, indexes and results that were written earlier hold these values."""
    assert digest_of(["d1", "d2"]) == IDS_HASH
    assert sample_corpus(COLLECTION, 2)[1].ids_sha256 == IDS_HASH
    assert COLLECTION.corpus_hash() == "4fb2cbcdeea835fdecdd57d8c9ecc17fe3128ce652d2ff1eaa7c59d379cd9d2c"
    assert ordered_queries_hash(QUERIES) == "c557dae3077335394d83b1a4d21de4a31eab85edff7bb198b0e8dd1884bb2365"
    plain = tuple(dataclasses.replace(query, instruction="") for query in QUERIES)
    assert unordered_queries_hash(COLLECTION) != unordered_queries_hash(
        dataclasses.replace(COLLECTION, queries=plain)
    )
    assert (
        unordered_queries_hash(dataclasses.replace(COLLECTION, queries=plain))
        == "ddfbc9eac38507aedd44044ea6318f59cb5d9eaad0dbfa33cb3c7661ac0aa817"
    )
    assert (
        unordered_documents_hash(COLLECTION)
        == "f227e2f89d9a0542e5db405fcf267d6fb47bb28b8e6a1d93df2d77164f54e173"
    )
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"query": "x", "positive": [{"title": "A title", "text": "Körper"}]}\n', encoding="utf-8"
    )
    documents = read_jsonl(file, Problems())["train"].documents
    assert documents[0].doc_id == "b9bbeb277b9a380ab531f06b8ccfc362"


def test_a_digest_sees_where_strings_end() -> None:
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(file) as temporary:
        temporary.with_name("missing").read_text()
    assert file.read_text() == "old"
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    write_bytes(file, b"bytes")
    write_array(tmp_path / "x.npy", np.arange(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.npy"]
    assert file.read_bytes() == b"bytes"


def test_json_lines_end_at_newlines_alone_for_every_reader(tmp_path: Path) -> None:
    """Every character that some reader ends a line at, half a surrogate pair, and a torn last line."""
    ends = [chr(i) for i in range(0x3000) if len(f"a{chr(i)}b".splitlines()) > 1]
    assert {"\n", "\r", "\x0c", "\x1e", "\x85", "\u2028", "\u2029"} <= set(ends)
    records = [{"id": f"a{end}b é"} for end in [*ends, "\ud83d", "\0"]]
    file = tmp_path / "a.jsonl"
    write_json_lines(file, records[:3])
    for record in records[3:]:
        append_json_line(file, record, durable=True)
    assert read_json_lines(file) == records
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == records
    assert "é" in file.read_text(encoding="utf-8")
    with file.open("a") as opened:
        opened.write('{"id": ')
    assert read_json_lines(file) == records
    assert read_json_lines(tmp_path / "missing.jsonl") == []
    # As older versions wrote them.
    file.write_text(json.dumps(records[-4], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_json_lines(file) == [records[-4]]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    link = tmp_path / "link"
    link.symlink_to("share/file")
    write_bytes(link, b"new")
    assert link.is_symlink()
    target = tmp_path / "share" / "file"
    assert target.read_bytes() == b"new"
    target.chmod(0o640)
    write_bytes(link, b"newer")
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"newer", 0o640)
    assert [file.name for file in target.parent.iterdir()] == ["file"]


def test_a_pipe_and_an_open_file_take_the_bytes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(reader, "rb") as opened:
        write_bytes(tmp_path / "pipe", b"bytes")
        assert opened.read() == b"bytes"
    assert (tmp_path / "pipe").is_fifo()
    for device in ("/dev/null", "/dev/full"):
        before = os.stat(device).st_rdev
        with contextlib.suppress(OSError):
            write_bytes(Path(device), b"bytes")
        assert (Path(device).is_char_device(), os.stat(device).st_rdev) == (True, before)
    # What is printed before and after stays.
    with (tmp_path / "out").open("wb") as file:
        file.write(b"before\n")
        file.flush()
        write_bytes(Path(f"/dev/fd/{file.fileno()}"), b"bytes\n")
        file.seek(0, os.SEEK_END)
        file.write(b"after\n")
    assert (tmp_path / "out").read_bytes() == b"before\nbytes\nafter\n"


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 255)
    write_bytes(file, b"bytes")
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
