"""Reading lines that may be anything: bounded, and every fault named with its line."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from search_r3_jax import lines
from search_r3_jax.commands.vector_files import read_texts
from search_r3_jax.errors import UserError
from search_r3_jax.lines import LineError, Problems, parse_object, read_lines, string_field


def read(path: Path, *, skip_bad: bool = False) -> tuple[list[str], Problems]:
    problems = Problems(skip_bad=skip_bad)
    return [line for _, line in read_lines(path, problems)], problems


def test_lines_end_at_newlines_only_and_blank_ones_count(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\n \t\ntwo\u2028\x0c still two\nlast".encode())
    assert list(read_lines(file, Problems())) == [
        (f"{file}, line 1", "one"),
        (f"{file}, line 4", "two\u2028\x0c still two"),
        (f"{file}, line 5", "last"),
    ]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert read(tmp_path / "a.txt.gz")[0] == read(file)[0]


def test_texts_are_the_same_with_and_without_a_byte_order_mark_and_gzip(tmp_path: Path) -> None:
    texts = ["one", "", " two\u2028\x85", "last"]
    lines_of = {
        "a.txt": "\r\n".join(texts) + "\r\n",
        "b.jsonl": "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
    }
    for name, content in lines_of.items():
        for mark in ("", "\ufeff"):
            raw = (mark + content).encode()
            for file, written in (
                (tmp_path / name, raw),
                (tmp_path / name.upper(), raw),
                (tmp_path / f"{name.upper()}.GZ", gzip.compress(raw)),
            ):
                file.write_bytes(written)
                assert list(read_texts(file, "query").texts) == texts, file


@pytest.mark.parametrize("ending", [b"\n", b""])
@pytest.mark.parametrize("excess", [1, 2, 100, 101, 102, 350])
def test_a_long_line_is_refused_or_skipped_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int, ending: bytes
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    fits, long = b"f" * 99, b"x" * (100 + excess - len(ending))
    file = tmp_path / "a.txt"
    file.write_bytes(fits + b"\n" + long + b"\n" + b"after\n" + long + ending)
    with pytest.raises(UserError, match=r"a\.txt, line 2: longer than 100 bytes"):
        read(file)
    found, problems = read(file, skip_bad=True)
    assert (found, problems.counts) == ([fits.decode(), "after"], {"line too long": 2})


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.touch()
    os.truncate(file, 2**30)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.txt, line 1: longer than 67108864 bytes"):
            read(file)
        assert tracemalloc.get_traced_memory()[1] < 3 * lines.MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"caf\xe9", "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"a\0b", "holds a NUL byte"),
        ("a".encode("utf-16-le"), "holds a NUL byte"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, raw: bytes, text: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n" + raw + b"\nthree\n")
    with pytest.raises(UserError, match=rf"a\.txt, line 2: {text}"):
        read(file)
    found, problems = read(file, skip_bad=True)
    assert found == ["one", "three"]
    assert problems.counts.total() == 1
    assert problems.listed[0].startswith(f"{file}, line 2: {text}")


def test_every_cut_and_every_flipped_byte_of_a_gzip_file_is_read_or_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"a line of text\n" * 40 + bytes(range(65, 90)) + b"\n", mtime=0)
    damaged = [whole[:end] for end in range(1, len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    file = tmp_path / "a.gz"
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        _, problems = read(file, skip_bad=True)
        if problems.counts:
            refused += 1
            with pytest.raises(UserError, match=r"a\.gz, (after )?line \d+: "):
                read(file)
    # What may pass is the header's time stamp, system and flags.
    assert refused >= len(damaged) - 12


def test_a_file_that_cannot_be_opened_is_a_user_error_with_skip_bad_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: cannot be read \(No such file"):
        read(tmp_path / "missing", skip_bad=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "malformed JSON"),
        ("", "malformed JSON"),
        ('{"a": 1} {}', "malformed JSON"),
        ('{"a": ' + "9" * 5000 + "}", "malformed JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("[1]", "no JSON object"),
        ("null", "no JSON object"),
        ('{"b": "x"}', "missing field"),
        ('{"a": null}', "wrong type"),
        ('{"a": 1}', "wrong type"),
        ('{"a": "\\ud800"}', "unpaired surrogate"),
        ('{"a": "\\u0000"}', "NUL byte"),
    ],
)
def test_bad_objects_and_fields(line: str, reason: str) -> None:
    with pytest.raises(LineError) as caught:
        string_field(parse_object(line), "a")
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_only_the_first_problems_are_listed() -> None:
    problems = Problems(skip_bad=True)
    for number in range(50):
        with problems.at(f"line {number}"):
            raise LineError("even" if number % 2 == 0 else "odd", "text")
    assert problems.counts == {"even": 25, "odd": 25}
    assert problems.listed == [f"line {number}: text" for number in range(20)]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_a_file_of_a_byte_order_mark_alone_is_empty(tmp_path: Path, content: bytes) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert read_texts(tmp_path / name, "document").texts == []
    (tmp_path / "b.txt").write_bytes(content + b"\n")
    assert read_texts(tmp_path / "b.txt", "document").texts == [""]


def test_an_optional_field_may_be_null() -> None:
    assert string_field({"title": None}, "title", default="") == ""
    with pytest.raises(LineError, match="'text' must be a string, got NoneType"):
        string_field({"text": None}, "text")
