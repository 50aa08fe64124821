"""Files with a query and its documents a line."""

import gzip
import json
from pathlib import Path

import pytest

from search_r3_jax.data.collection import Document
from search_r3_jax.data.jsonl import read_jsonl
from search_r3_jax.errors import UserError
from search_r3_jax.lines import Problems

GOOD = {"query": "what purrs", "positive": "A cat purrs."}


def write(path: Path, *records: object) -> Path:
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def test_every_field_and_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pets.jsonl",
        {**GOOD, "query_id": "q1", "negative": ["Dogs bark.", {"title": "Owl", "text": "hoots"}]},
        {
            **{
                "query": "what barks",
                "split": "dev",
                "instruction": "Find the animal.",
                "reasoning": "Dogs do.",
                "other": 1,
            },
            **{
                "positive": [{"text": "Dogs bark.", "relevance": 3}, "A wolf.", "A wolf."],
                "negative": "A cat purrs.",
            },
        },
    )
    collections = read_jsonl(path, Problems())
    assert list(collections) == ["train", "dev"]
    train, dev = collections["train"], collections["dev"]
    assert (train.name, train.split, dev.split) == ("pets", "train", "dev")
    assert train.documents == dev.documents
    assert [(document.title, document.text) for document in train.documents] == [
        *[("", "A cat purrs."), ("", "Dogs bark."), ("Owl", "hoots"), ("", "A wolf.")],
    ]
    cat, dog, owl, wolf = (document.doc_id for document in train.documents)
    (query,) = train.queries
    assert (query.query_id, query.text, query.instruction, query.reasoning) == ("q1", "what purrs", "", "")
    assert (query.positives, query.negatives) == ({cat: 1}, (dog, owl))
    (query,) = dev.queries
    assert (query.text, query.instruction, query.reasoning) == ("what barks", "Find the animal.", "Dogs do.")
    assert (query.positives, query.negatives) == ({dog: 3, wolf: 1}, (cat,))
    assert query.query_id not in {cat, dog, owl, wolf}

    (tmp_path / "zipped").mkdir()
    zipped = tmp_path / "zipped" / "pets.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_jsonl(zipped, Problems()) == collections


def test_ids_come_from_the_content_alone(tmp_path: Path) -> None:
    one = read_jsonl(
        write(tmp_path / "a.jsonl", GOOD, {"query": "x", "positive": {**GOOD}["positive"]}), Problems()
    )["train"]
    two = read_jsonl(write(tmp_path / "b.jsonl", {"query": "y", "positive": "z"}, GOOD), Problems())["train"]
    assert len(one.documents) == 1
    assert one.documents[0] in two.documents
    assert one.queries[0] in two.queries
    # A title is part of the content, and its border with the text too.
    titled = [{"text": "c", "title": "ab"}, {"text": "bc", "title": "a"}, "abc"]
    three = read_jsonl(write(tmp_path / "c.jsonl", {"query": "q", "positive": titled}), Problems())["train"]
    assert len({document.doc_id for document in three.documents}) == 3


def test_lines_with_the_same_query_are_one_query(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"query": "q", "positive": "a"},
        {"query": "other", "positive": "b"},
        {"query": "q", "positive": ["b", "a"], "negative": "c"},
        {"query": "q", "positive": "c", "instruction": "differently"},
        {"query": "q", "positive": "c", "split": "dev"},
    )
    collections = read_jsonl(path, Problems())
    a, b, c = (document.doc_id for document in collections["train"].documents)
    assert [(query.text, query.positives, query.negatives) for query in collections["train"].queries] == [
        *[("q", {a: 1, b: 1}, (c,)), ("other", {b: 1}, ()), ("q", {c: 1}, ())],
    ]
    assert [query.positives for query in collections["dev"].queries] == [{c: 1}]


BAD = [
    ("{", "not valid JSON", "malformed JSON"),
    ("[]", "expected a JSON object, got list", "no JSON object"),
    ({"positive": "a"}, "field 'query' is missing", "missing field"),
    ({"query": "a"}, "field 'positive' is missing", "missing field"),
    ({**GOOD, "query": 3}, "field 'query' must be a string, got int", "wrong type"),
    ({**GOOD, "query": " \n"}, "field 'query' is empty", "empty text"),
    ({**GOOD, "positive": ""}, r"field 'positive\[0\]' is empty", "empty text"),
    ({**GOOD, "positive": []}, "field 'positive' is an empty list", "empty list"),
    ({**GOOD, "positive": None}, "field 'positive' must be a string or a list, got NoneType", "wrong type"),
    ({**GOOD, "positive": ["a", 4]}, r"field 'positive\[1\]' must be a string, got int", "wrong type"),
    ({**GOOD, "positive": [["a"]]}, r"field 'positive\[0\]' must be a string, got list", "wrong type"),
    ({**GOOD, "positive": [{"title": "a"}]}, r"field 'positive\[0\].text' is missing", "missing field"),
    (
        {**GOOD, "positive": [{"text": "a", "title": 1}]},
        r"field 'positive\[0\].title' must be a string",
        "wrong type",
    ),
    (
        {**GOOD, "positive": [{"text": "a", "relevance": 0}]},
        r"field 'positive\[0\].relevance' must be 1 to",
        "bad relevance",
    ),
    (
        {**GOOD, "positive": [{"text": "a", "relevance": 2**31}]},
        r"field 'positive\[0\].relevance' must be 1 to",
        "bad relevance",
    ),
    (
        {**GOOD, "positive": [{"text": "a", "relevance": True}]},
        r"field 'positive\[0\].relevance' must be an integer",
        "wrong type",
    ),
    (
        {**GOOD, "positive": [{"text": "a", "relevance": 1.0}]},
        r"field 'positive\[0\].relevance' must be an integer",
        "wrong type",
    ),
    (
        {**GOOD, "negative": [{"text": "a", "relevance": 1}]},
        r"field 'negative\[0\].relevance' must be 0;",
        "bad relevance",
    ),
    ({**GOOD, "negative": ["b", GOOD["positive"]]}, "is judged twice, 1 and 0", "contradictory judgement"),
    (
        {**GOOD, "positive": ["a", {"text": "a", "relevance": 2}]},
        "is judged twice, 1 and 2",
        "contradictory judgement",
    ),
    (
        {"query": "first", "positive": ["only here", {"text": "a", "relevance": 2}]},
        "is judged twice, 1 and 2",
        "contradictory judgement",
    ),
    ({**GOOD, "instruction": 3}, "field 'instruction' must be a string", "wrong type"),
    ({**GOOD, "reasoning": ["x"]}, "field 'reasoning' must be a string", "wrong type"),
    ({**GOOD, "split": 0}, "field 'split' must be a string", "wrong type"),
    ({**GOOD, "split": "all"}, "field 'split': 'all' is not usable", "bad split name"),
    ({**GOOD, "split": "a/b"}, "field 'split': 'a/b' is not usable", "bad split name"),
    ({**GOOD, "query_id": ""}, "field 'query_id' is empty", "empty text"),
    ({**GOOD, "query_id": "taken"}, "field 'query_id': 'taken' appears twice", "duplicate id"),
    (
        '{"query": "\\ud800", "positive": "a"}',
        "field 'query' holds an unpaired surrogate",
        "unpaired surrogate",
    ),
    (
        '{"query": "a", "positive": ["\\udc00"]}',
        r"field 'positive\[0\]' holds an unpaired surrogate",
        "unpaired surrogate",
    ),
    ('{"query": "a\\u0000", "positive": "a"}', "field 'query' holds a NUL byte", "NUL byte"),
    (
        '{"query": "a", "positive": [{"text": "a", "relevance": ' + "1" * 5000 + "}]}",
        "too many digits",
        "malformed JSON",
    ),
    (
        '{"query": "a", "positive": ' + "[" * 10_000 + "]" * 10_000 + "}",
        "nested too deeply",
        "malformed JSON",
    ),
]


@pytest.mark.parametrize(
    ("line", "message", "reason"), BAD, ids=[f"{index}-{reason}" for index, (_, _, reason) in enumerate(BAD)]
)
def test_a_bad_line_is_named_or_leaves_no_trace(
    tmp_path: Path, line: object, message: str, reason: str
) -> None:
    good = [
        {"query": "first", "positive": "a"},
        {"query": "second", "positive": "b", "query_id": "taken", "split": "dev"},
    ]
    path = write(tmp_path / "a.jsonl", *good, line, GOOD)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{message}") as caught:
        read_jsonl(path, Problems())
    assert "\n" not in str(caught.value)
    problems = Problems(skip_bad=True)
    skipped = read_jsonl(path, problems)
    assert problems.counts == {reason: 1}
    assert problems.listed == [str(caught.value)]
    assert skipped == read_jsonl(write(path, *good, GOOD), Problems())


def test_a_file_with_nothing_in_it_is_an_error_with_skip_bad_too(tmp_path: Path) -> None:
    for content in ("", "\n \n", "{\n"):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"a\.jsonl: no queries"):
            read_jsonl(tmp_path / "a.jsonl", Problems(skip_bad=True))


def test_contents_with_line_ends_stay_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"query": "q\r\n\u2028", "positive": " two\nlines \n"})
    collection = read_jsonl(path, Problems())["train"]
    assert collection.queries[0].text == "q\r\n\u2028"
    (document,) = collection.documents
    assert document == Document(doc_id=document.doc_id, title="", text=" two\nlines \n")
