"""Selecting hard negatives: against a loop over everything, and against `mine_hard_negatives` of
sentence-transformers."""

import sys
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sentence_transformers.util.hard_negatives as reference
import torch
from helpers.platforms import needs_scann
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import LocalIndex
from search_r3_jax.retrieval.mining.select import (
    MiningOptions,
    Selection,
    distinct_texts,
    mine_negatives,
    select_negatives,
)


def unit(generator: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    vectors = generator.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made(
    seed: int, *, documents: int = 40, queries: int = 12, most_positives: int = 3, judged: bool = True
) -> Collection:
    """Random judgements over documents of which some have the same text, and queries of which two have the
    same."""
    generator = np.random.default_rng(seed)
    texts = [f"text {row if row % 7 else 0}" for row in range(documents)]
    asked = []
    for row in range(queries):
        known = [f"d{d}" for d in generator.choice(documents, most_positives + 3, replace=False)]
        count = int(generator.integers(1, most_positives + 1))
        negatives = tuple(known[count : count + int(generator.integers(0, 3))]) if judged else ()
        asked.append(
            Query(
                query_id=f"q{row}",
                text=f"query {max(1, row)}",
                positives=dict.fromkeys(known[:count], 1),
                negatives=negatives,
            )
        )
    return Collection(
        name="made",
        split="train",
        documents=tuple(Document(doc_id=f"d{row}", title="", text=text) for row, text in enumerate(texts)),
        queries=tuple(asked),
    )


def vectors_for(collection: Collection, seed: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the different documents [U,E] and of the queries [Q,E]; the same for queries of one text."""
    generator = np.random.default_rng([seed, 1])
    documents = unit(generator, len(distinct_texts(collection).documents), dim)
    of_text = {query.text: unit(generator, 1, dim)[0] for query in collection.queries}
    return documents, np.stack([of_text[query.text] for query in collection.queries])


def mined(
    collection: Collection,
    documents: np.ndarray,
    queries: np.ndarray,
    options: MiningOptions,
    index: LocalIndex | None = None,
) -> Selection:
    texts = distinct_texts(collection)
    ids = [document.doc_id for document in texts.documents]
    return mine_negatives(
        index or ExactIndex(documents, ids, 0),
        queries,
        [query.query_id for query in collection.queries],
        texts,
        options,
    )


def by_hand(
    collection: Collection, documents: np.ndarray, queries: np.ndarray, options: MiningOptions
) -> list[dict[str, Any]]:
    """For each query what `top` takes and all that may be taken, as texts, one document after the other."""
    body_of = {document.doc_id: document.body for document in collection.documents}
    vector_of = dict(zip(dict.fromkeys(body_of.values()), documents.astype(np.float64), strict=True))
    found = []
    for query, vector in zip(collection.queries, queries.astype(np.float64), strict=True):
        relevant = {
            body_of[d] for other in collection.queries if other.text == query.text for d in other.positives
        }
        judged = {body_of[d] for d in query.negatives} - relevant
        score = {body: float(vector @ vector_of[body]) for body in vector_of}
        weakest = min(score[body] for body in relevant)
        rank, left, counts = 0, [], Counter()
        for body in sorted(score, key=lambda body: -score[body]):
            if rank >= options.end_rank:
                break
            if body in relevant or body in judged:
                counts["positives" if body in relevant else "judged"] += 1
                continue
            rank += 1
            if rank - 1 < options.first_rank:
                continue
            too_close = options.max_score is not None and score[body] > options.max_score
            too_close |= options.margin is not None and score[body] > weakest - options.margin
            too_close |= (
                options.relative_margin is not None
                and score[body] > weakest - abs(weakest) * options.relative_margin
            )
            counts["too_close"] += too_close
            if not too_close:
                left.append(body)
        found.append(
            {
                "left": left,
                "top": left[: options.num_negatives],
                **{key: counts[key] for key in ("positives", "judged", "too_close")},
            }
        )
    return found


def texts_of(collection: Collection, selection: Selection) -> list[list[str]]:
    documents = distinct_texts(collection).documents
    return [[documents[row].body for row in rows if row >= 0] for rows in selection.rows]


limits = st.one_of(st.none(), st.floats(0.0, 1.0))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_negatives=st.integers(1, 6),
    first_rank=st.integers(0, 9),
    ranks=st.one_of(st.none(), st.integers(6, 60)),
    max_score=limits,
    margin=limits,
    relative_margin=limits,
    sampling=st.sampled_from(["top", "random"]),
)
def test_against_a_loop_over_every_document(
    seed: int, first_rank: int, ranks: int | None, **fields: Any
) -> None:
    options = MiningOptions(
        first_rank=first_rank, last_rank=None if ranks is None else first_rank + ranks, seed=seed, **fields
    )
    collection = made(seed)
    documents, queries = vectors_for(collection, seed)
    selection = mined(collection, documents, queries, options)
    assert selection.rows.shape == (len(collection.queries), options.num_negatives)
    for q, (found, expected) in enumerate(
        zip(texts_of(collection, selection), by_hand(collection, documents, queries, options), strict=True)
    ):
        if options.sampling == "top":
            assert found == expected["top"]
        else:
            assert found == [body for body in expected["left"] if body in found]
            assert len(found) == len(expected["top"])
        assert [expected[key] for key in ("positives", "judged", "too_close")] == [
            selection.positives[q],
            selection.judged[q],
            selection.too_close[q],
        ]


def test_a_window_by_hand() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, -np.inf]])
    rows = np.array([[7, 3, 9, 1, 4, 8, -1]])
    given: dict[str, Any] = {
        "positives": [np.array([3])],
        "judged": [np.array([4])],
        "weakest_q": np.array([0.8]),
    }

    def select(**fields: Any) -> list[int]:
        return (
            select_negatives(scores, rows, **given, options=MiningOptions(num_negatives=2, **fields))
            .rows[0]
            .tolist()
        )

    assert select() == [7, 9]
    assert select(first_rank=1) == [9, 1]
    assert select(first_rank=3) == [8, -1]
    assert select(margin=0.0) == [9, 1]
    assert select(margin=0.15) == [1, 8]
    assert select(relative_margin=0.5) == [8, -1]
    assert select(max_score=0.65) == [1, 8]
    assert select(first_rank=1, last_rank=3, max_score=0.65) == [1, -1]


def test_random_draws_hang_on_seed_and_query_alone() -> None:
    collection = made(5, judged=False)
    documents, queries = vectors_for(collection, 5)
    options = MiningOptions(num_negatives=3, last_rank=20, sampling="random", seed=1)
    rows = mined(collection, documents, queries, options).rows
    turned = Collection(
        name="made", split="train", documents=collection.documents, queries=collection.queries[::-1]
    )
    np.testing.assert_array_equal(mined(turned, documents, queries[::-1], options).rows[::-1], rows)
    np.testing.assert_array_equal(mined(collection, documents, queries, options).rows, rows)
    assert not np.array_equal(
        mined(
            collection, documents, queries, MiningOptions(num_negatives=3, last_rank=20, sampling="random")
        ).rows,
        rows,
    )


def test_random_draws_take_every_rank_as_often() -> None:
    Q, window, n = 4000, 10, 3
    texts = [f"q{q}" for q in range(Q)]
    collection = Collection(
        name="even",
        split="train",
        documents=tuple(Document(doc_id=str(row), title="", text=str(row)) for row in range(window + 1)),
        queries=tuple(Query(query_id=text, text=text, positives={str(window): 1}) for text in texts),
    )
    # One direction a document; a query leans to the first ones, and away from its positive.
    documents = np.eye(window + 1, dtype=np.float32)
    queries = np.tile(np.append(np.linspace(1, 0, window), -1.0), (Q, 1)).astype(np.float32)
    options = MiningOptions(num_negatives=n, last_rank=window, sampling="random")
    found = mined(collection, documents, queries, options).rows
    counts = np.bincount(found.ravel(), minlength=window)
    expected = Q * n / window
    assert len(counts) == window
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert (np.diff(found, axis=1) > 0).all()


@needs_scann
def test_both_indexes_give_the_same() -> None:
    collection = made(3, documents=300, queries=40)
    documents, queries = vectors_for(collection, 3, dim=16)
    for options in (
        MiningOptions(),
        MiningOptions(first_rank=4, margin=0.05, relative_margin=0.1, sampling="random"),
    ):
        texts = distinct_texts(collection)
        found = mined(
            collection,
            documents,
            queries,
            options,
            build_index("scann", documents, [d.doc_id for d in texts.documents], 0),
        )
        for a, b in zip(found, mined(collection, documents, queries, options), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pieces_of_bounded_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    collection = made(8, most_positives=9)
    documents, queries = vectors_for(collection, 8)
    whole = mined(collection, documents, queries, MiningOptions(margin=0.1))
    monkeypatch.setattr("search_r3_jax.retrieval.mining.select.GATHERED_BYTES", 1)
    for a, b in zip(whole, mined(collection, documents, queries, MiningOptions(margin=0.1)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_copies_of_a_positive_are_left_out_and_other_copies_come_once() -> None:
    bodies = {"a": "same", "b": "same", "c": "other", "d": "other", "e": "third"}
    collection = Collection(
        name="copies",
        split="train",
        documents=tuple(Document(doc_id=doc_id, title="", text=body) for doc_id, body in bodies.items()),
        queries=(Query(query_id="q", text="q", positives={"b": 1}),),
    )
    documents, queries = (
        np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], np.float32),
        np.array([[1.0, 0.0]], np.float32),
    )
    assert texts_of(collection, mined(collection, documents, queries, MiningOptions())) == [
        ["other", "third"]
    ]
    assert [document.doc_id for document in distinct_texts(collection).documents] == ["a", "c", "e"]


class Columns:
    """As much of `datasets.Dataset` as the reference touches; the package itself is no dependency of ours."""

    def __init__(self, columns: dict[str, list[Any]]):
        self._columns, self.column_names = columns, list(columns)

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]]) -> "Columns":
        return cls(columns)

    def __len__(self) -> int:
        return len(self._columns[self.column_names[0]])

    def __getitem__(self, name: str) -> list[Any]:
        return self._columns[name]

    def to_pandas(self) -> "Columns":
        return self

    def groupby(self, name: str) -> "Columns":
        return Columns({other: [Counter(self[name])] for other in self.column_names if other != name})

    def count(self) -> "Columns":
        return self

    def to_dict(self) -> dict[str, Any]:
        return {name: values[0] for name, values in self._columns.items()}


class Vectors:
    """A model for the reference that knows the vectors already."""

    device = "cpu"

    def __init__(self, vectors: dict[str, np.ndarray]):
        self._vectors = vectors

    def encode_document(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return np.stack([self._vectors[text] for text in texts])

    encode_query = encode_document

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> torch.Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=1)


# Where its ranks are ours: with limits it counts `range_min` among what they leave, and looks as far behind
# `range_max` as there are positives; so a limit comes with the first rank and the whole corpus.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"first_rank": 5}, {"range_min": 5}),
        (
            {"first_rank": 3, "last_rank": 20, "num_negatives": 7},
            {"range_min": 3, "range_max": 20, "num_negatives": 7},
        ),
        ({"margin": 0.1, "last_rank": 90}, {"absolute_margin": 0.1, "range_max": 90}),
        ({"relative_margin": 0.05, "last_rank": 90}, {"relative_margin": 0.05, "range_max": 90}),
        ({"max_score": 0.3, "last_rank": 90}, {"max_score": 0.3, "range_max": 90}),
        (
            {"max_score": 0.2, "margin": 0.0, "relative_margin": 0.5, "last_rank": 90},
            {"max_score": 0.2, "absolute_margin": 0.0, "relative_margin": 0.5, "range_max": 90},
        ),
        (
            {"margin": 0.6, "last_rank": 90, "num_negatives": 60},
            {"absolute_margin": 0.6, "range_max": 90, "num_negatives": 60},
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_negatives_of_sentence_transformers(
    monkeypatch: pytest.MonkeyPatch, ours: dict[str, Any], theirs: dict[str, Any], seed: int
) -> None:
    monkeypatch.setattr(reference, "is_datasets_available", lambda: True)
    stub = types.ModuleType("datasets")
    stub.__dict__["Dataset"] = Columns
    monkeypatch.setitem(sys.modules, "datasets", stub)
    collection = made(seed, documents=90, queries=30, judged=False)
    documents, queries = vectors_for(collection, seed)
    body_of = {document.doc_id: document.body for document in collection.documents}
    vectors = dict(zip(dict.fromkeys(body_of.values()), documents, strict=True))
    vectors |= {query.text: vector for query, vector in zip(collection.queries, queries, strict=True)}
    pairs = [(query.text, body_of[doc_id]) for query in collection.queries for doc_id in query.positives]
    wanted: dict[str, Any] = {"num_negatives": 4} | theirs
    # Any: neither is what the reference says it takes.
    given: Any = Columns({"query": [query for query, _ in pairs], "positive": [body for _, body in pairs]})
    model: Any = Vectors(vectors)
    result: Any = reference.mine_hard_negatives(
        given, model, corpus=list(dict.fromkeys(body_of.values())), verbose=False, **wanted
    )
    expected: dict[str, list[str]] = {}
    for query, negative in zip(result["query"], result["negative"], strict=True):
        # A line for each positive: the same negatives again.
        if negative not in expected.setdefault(query, []):
            expected[query].append(negative)
    found = texts_of(collection, mined(collection, documents, queries, MiningOptions(**ours)))
    assert sum(map(len, found)) > 0
    for query, negatives in zip(collection.queries, found, strict=True):
        assert negatives == expected.get(query.text, [])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_negatives": 0}, "--num-negatives: 0"),
        ({"first_rank": -1}, "--first-rank: -1"),
        ({"first_rank": 5, "last_rank": 5}, "--last-rank: 5: the window is empty"),
        ({"first_rank": 5, "last_rank": 2}, "--last-rank: 2: the window is empty"),
        ({"last_rank": 0}, "--last-rank: 0: the window is empty"),
        ({"last_rank": 3}, "--last-rank: 3: 3 ranks do not hold --num-negatives 4"),
        ({"margin": -0.1}, "--margin: -0.1: give a number from 0 to 2"),
        ({"margin": float("nan")}, "--margin: nan"),
        ({"relative_margin": 1.5}, "--relative-margin: 1.5: give a number from 0 to 1"),
        ({"max_score": 1.01}, "--max-score: 1.01: give a number from -1 to 1"),
        ({"sampling": "best"}, "--sampling: 'best'"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_options_that_mine_nothing_are_one_line(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        MiningOptions(**fields)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)
