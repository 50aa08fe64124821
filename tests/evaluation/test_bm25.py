import os
import sys
from pathlib import Path

import numpy as np
import pytest
import Stemmer

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.bm25 import bm25_run
from search_r3_jax.evaluation.metrics import evaluate_run
from search_r3_jax.text.words import plain_words, split_identifiers

REAL_DATA = Path(os.environ.get("SEARCH_R3_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


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
    parts = [
        "readFile",
        "write_file",
        "parse",
        "jsonText",
        "sort_list",
        "list",
        "Graph2",
        "node",
        "textNode",
        "file",
    ]
    texts = [" ".join(rng.choice(parts, rng.integers(3, 12))) for _ in range(40)]
    documents = tuple(
        Document(doc_id=f"d{row}", title="node" if row % 5 == 0 else "", text=text)
        for row, text in enumerate(texts)
    )
    queries = [
        "the file of a node",
        "parse json text text",
        "graph2 list",
        "unknown words only",
        "write_file",
    ]
    return Collection(
        name="made",
        split="test",
        documents=documents,
        queries=tuple(
            Query(query_id=f"q{row}", text=text, positives={"d0": 1}) for row, text in enumerate(queries)
        ),
    )


def stemmed_words(text: str) -> list[str]:
    stemmer = Stemmer.Stemmer("english")
    return [
        word if word in ("the", "of", "a") else stemmer.stemWord(word)
        for word in plain_words(text)
        if len(word) > 1
    ]


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
    expected_qd = naive_bm25(made, split_identifiers if identifiers else stemmed_words, k1, b)
    assert list(run) == [query.query_id for query in made.queries]
    for scores, expected_d in zip(run.values(), expected_qd, strict=True):
        expected = {made.documents[int(row)].doc_id: expected_d[row] for row in np.flatnonzero(expected_d)}
        assert scores == pytest.approx(expected, rel=1e-5)
    assert run["q3"] == {}


def test_keeps_the_k_best() -> None:
    made = collection()
    best = bm25_run(made, k=4, identifiers=True)["q0"]
    everything = bm25_run(made, k=40, identifiers=True)["q0"]
    assert sorted(best.values()) == sorted(everything.values())[-4:]


def test_words_meet_in_their_stem() -> None:
    documents = (
        Document(doc_id="d0", title="", text="the heating of houses was studied"),
        Document(doc_id="d1", title="", text="a cold winter"),
        Document(doc_id="d2", title="", text="nothing of the kind"),
    )
    asked = Query(query_id="q", text="studies that heat a house", positives={"d0": 1})
    made = Collection(name="made", split="test", documents=documents, queries=(asked,))
    assert list(bm25_run(made, identifiers=False)["q"]) == ["d0"]
    assert bm25_run(made, identifiers=True)["q"] == {}


# nDCG@10 of an implementation of its own (Lucene's BM25, k1 = 0.9, b = 0.4, stemmed), as the data sets' table
# has it.
@pytest.mark.parametrize(("name", "expected"), [("scifact", 0.676), ("conala", 0.491), ("mbpp", 0.102)])
def test_real_sets_have_their_known_values(name: str, expected: float) -> None:
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"no {name} in SEARCH_R3_DATA")
    collection = load_collection(REAL_DATA / name, "test")
    mean, _ = evaluate_run(collection.qrels(), bm25_run(collection, identifiers=False))
    assert mean.ndcg_at_10 == pytest.approx(expected, abs=0.005)


def test_missing_stemmer_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(UserError, match=r"PyStemmer .* pip install 'search_r3_jax\[eval\]'"):
        bm25_run(collection(), identifiers=False)


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'search_r3_jax\[quickstart\]'"):
        bm25_run(collection(), identifiers=True)
