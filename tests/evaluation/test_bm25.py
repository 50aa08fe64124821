import sys

import numpy as np
import pytest

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.bm25 import bm25_run
from search_r3_jax.text.words import plain_words, split_identifiers


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("snake_case_name", ["snake", "case", "name"]),
        ("camelCaseName", ["camel", "case", "name"]),
        ("parseHTTPResponse2", ["parse", "http", "response", "2"]),
        ("HTTPServer.__init__(self)", ["http", "server", "init", "self"]),
        ("sha256sum x1 42nd", ["sha", "256", "sum", "x", "1", "42", "nd"]),
        ("Sort A list", ["sort", "a", "list"]),
        ("naïve_Größe", ["naïve", "größe"]),
        ("", []),
    ],
)
def test_split_identifiers(text: str, parts: list[str]) -> None:
    assert split_identifiers(text) == parts


def test_plain_words_keep_identifiers_whole() -> None:
    assert plain_words("Call parse_Json2(X), twice") == ["call", "parse_json2", "x", "twice"]


def collection() -> Collection:
    rng = np.random.default_rng(0)
    parts = ["readFile", "write_file", "parse", "jsonText", "sort_list", "list", "Graph2", "node", "textNode", "file"]
    texts = [" ".join(rng.choice(parts, rng.integers(3, 12))) for _ in range(40)]
    documents = tuple(Document(doc_id=f"d{row}", title="node" if row % 5 == 0 else "", text=text) for row, text in enumerate(texts))
    queries = ["the file of a node", "parse json text text", "graph2 list", "unknown words only", "write_file"]
    return Collection(
        name="made",
        split="test",
        documents=documents,
        queries=tuple(Query(query_id=f"q{row}", text=text, positives={"d0": 1}) for row, text in enumerate(queries)),
    )


def naive_bm25(collection: Collection, words, k1: float, b: float) -> np.ndarray:
    documents = [words(document.body) for document in collection.documents]
    lengths = np.array([len(document) for document in documents], np.float64)
    scores_qd = np.zeros((len(collection.queries), len(documents)))
    for row, query in enumerate(collection.queries):
        for word in words(query.text):
            if word in ("the", "of", "a"):
                continue
            counts = np.array([document.count(word) for document in documents], np.float64)
            containing = (counts > 0).sum()
            idf = np.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            scores_qd[row] += idf * counts / (counts + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores_qd


@pytest.mark.parametrize("identifiers", [True, False])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_agrees_with_a_naive_bm25(identifiers: bool, k1: float, b: float) -> None:
    made = collection()
    run = bm25_run(made, k1=k1, b=b, k=1000, identifiers=identifiers)
    expected_qd = naive_bm25(made, split_identifiers if identifiers else plain_words, k1, b)
    assert list(run) == [query.query_id for query in made.queries]
    for scores, expected_d in zip(run.values(), expected_qd, strict=True):
        expected = {made.documents[row].doc_id: expected_d[row] for row in np.flatnonzero(expected_d)}
        assert scores == pytest.approx(expected, rel=1e-5)
    assert run["q3"] == {}


def test_keeps_the_k_best() -> None:
    made = collection()
    best = bm25_run(made, k=4, identifiers=True)["q0"]
    everything = bm25_run(made, k=40, identifiers=True)["q0"]
    assert sorted(best.values()) == sorted(everything.values())[-4:]


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'search_r3_jax\[quickstart\]'"):
        bm25_run(collection(), identifiers=True)
