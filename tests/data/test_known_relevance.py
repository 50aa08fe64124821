"""Known positives over texts, against plain loops: queries and documents of one text share them."""

import itertools

import numpy as np
from helpers.tiny_models import byte_tokenizer

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.data.known_relevance import first_copies, known_documents, known_rows
from search_r3_jax.text.prompts import Prompter


def random_collection(seed: int, *, documents: int = 30, queries: int = 20) -> Collection:
    """Few texts under many ids, with and without a title, space around them, and instructions."""
    draw = np.random.default_rng(seed)
    made = tuple(
        Document(
            doc_id=f"d{i}", title="t" * int(draw.integers(2)), text=f"{draw.integers(8)}" + " " * (i % 2)
        )
        for i in range(documents)
    )
    asked = tuple(
        Query(
            query_id=f"q{i}",
            text=f"query {draw.integers(6)}",
            positives={f"d{row}": int(draw.integers(1, 4)) for row in draw.integers(documents, size=2)},
            instruction=["", "find code"][int(draw.integers(2))],
        )
        for i in range(queries)
    )
    return Collection(name=f"c{seed}", split="train", documents=made, queries=asked)


def expected_grades(collections: list[Collection], query: Query) -> dict[str, int]:
    """Body → highest grade that any query of the same text and instruction gives to any of its ids."""
    grades: dict[str, int] = {}
    for collection in collections:
        for other in collection.queries:
            if (other.text, other.instruction) != (query.text, query.instruction):
                continue
            for doc_id, grade in other.positives.items():
                body = collection.documents[collection.row_of[doc_id]].body.strip()
                grades[body] = max(grade, grades.get(body, 0))
    return grades


def test_copies_have_the_number_of_the_first() -> None:
    bodies = [document.body.strip() for document in random_collection(0).documents]
    assert first_copies([random_collection(0)]).tolist() == [bodies.index(body) for body in bodies]


def test_queries_of_one_text_share_their_positives_over_all_sets() -> None:
    collections = [random_collection(1), random_collection(2)]
    documents = list(itertools.chain(*(collection.documents for collection in collections)))
    known = known_documents(collections, first_copies(collections))
    for collection, of_query in zip(collections, known, strict=True):
        for query, grades in zip(collection.queries, of_query, strict=True):
            by_body = {documents[number].body.strip(): grade for number, grade in grades.items()}
            assert by_body == expected_grades(collections, query)
            assert len(by_body) == len(grades)


def test_rows_hold_every_copy() -> None:
    collection = random_collection(3)
    for query, grades in zip(collection.queries, known_rows(collection), strict=True):
        expected = expected_grades([collection], query)
        assert grades == {
            row: expected[document.body.strip()]
            for row, document in enumerate(collection.documents)
            if document.body.strip() in expected
        }


def test_distinct_texts_keep_their_own_judgements_in_order() -> None:
    documents = tuple(Document(doc_id=f"d{i}", title="", text=f"text {i}") for i in range(5))
    queries = tuple(
        Query(query_id=f"q{i}", text=f"query {i}", positives={f"d{4 - i}": 2, f"d{i}": 1}) for i in range(2)
    )
    collection = Collection(name="c", split="train", documents=documents, queries=queries)
    assert [list(grades.items()) for grades in known_rows(collection)] == [
        [(4, 2), (0, 1)],
        [(3, 2), (1, 1)],
    ]


def test_texts_that_prompts_hold_alike_are_twins() -> None:
    """Prompts leave the embed token's name out of a text, and space around it."""
    texts = ("abc d", f" abc {EMBED_TOKEN}d", f"abc d {EMBED_TOKEN}", "another")
    documents = tuple(Document(doc_id=f"d{i}", title="", text=text) for i, text in enumerate(texts))
    queries = tuple(
        Query(query_id=f"q{i}", text=text, positives={f"d{3 * i}": 1})
        for i, text in enumerate(("same q", f"same {EMBED_TOKEN}q"))
    )
    collection = Collection(name="c", split="train", documents=documents, queries=queries)
    assert first_copies([collection]).tolist() == [0, 0, 2, 3]
    assert [set(grades) for grades in known_rows(collection)] == [{0, 1, 3}, {0, 1, 3}]
    prompter = Prompter(byte_tokenizer(embed_token=True))
    rows = prompter.text_ids(texts, 99)
    assert rows[0] == rows[1] != rows[2]
