"""Batches of stage 1: a pure function of the step, whatever the chunks; negatives, judgements, and how little
is padding."""

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import byte_tokenizer, word_collection

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PAD, PairBatch, PairPipeline, TextChunks
from search_r3_jax.errors import UserError
from search_r3_jax.text.prompts import Prompter

SHARED = Path(os.environ.get("SEARCH_R3_DATA", Path(__file__).parents[3] / "shared" / "data"))
PROMPTER = Prompter(byte_tokenizer(embed_token=True))


def judged_collection() -> Collection:
    """Queries with one to three graded positives and up to four judged negatives."""
    collection = word_collection(documents=40, queries=20)
    ids = [document.doc_id for document in collection.documents]
    queries = tuple(
        dataclasses.replace(
            query,
            positives={ids[(i + k) % 40]: k + 1 for k in range(1 + i % 3)},
            negatives=tuple(ids[(i + 10 + k) % 40] for k in range(i % 5)),
        )
        for i, query in enumerate(collection.queries)
    )
    return dataclasses.replace(collection, queries=queries)


def pipeline(
    collections: tuple[Collection, ...], *, weights: tuple[float, ...] = (), **options: int
) -> PairPipeline:
    mixture = Mixture(collections=collections, weights=weights, seed=7)
    sizes: dict[str, Any] = {
        "global_batch": 8,
        "encode_chunk": 8,
        "max_query_tokens": 24,
        "max_document_tokens": 40,
    } | options
    return PairPipeline(mixture=mixture, prompter=PROMPTER, **sizes)


def texts_of(chunks: TextChunks) -> list[list[int]]:
    """Each text's tokens, read back from the rows by its segment number."""
    found = []
    for ids, segments, embed_at in zip(chunks.ids, chunks.segments, chunks.embed_at, strict=True):
        for number, at in enumerate(embed_at):
            inside = segments.ravel() == number
            assert segments.ravel()[at] == number
            assert ids.ravel()[at] == PROMPTER.embed_id
            assert np.flatnonzero(inside)[-1] == at
            found.append(ids.ravel()[inside].tolist())
    return found


def equal(first: PairBatch, second: PairBatch) -> bool:
    flat = [[*batch.queries, *batch.documents, *batch[2:]] for batch in (first, second)]
    return all(np.array_equal(a, b) for a, b in zip(*flat, strict=True))


def test_a_batch_depends_on_the_step_alone() -> None:
    collection = judged_collection()
    ahead = pipeline((collection,), negatives=2)
    batches = [ahead.batch(step) for step in range(5)]
    for step in (4, 0, 2):
        assert equal(pipeline((collection,), negatives=2).batch(step), batches[step])
    assert not equal(batches[0], batches[1])


def test_every_pair_comes_once_an_epoch_and_epochs_differ() -> None:
    collection = judged_collection()
    mixture = Mixture(collections=(collection,), seed=3)
    size = mixture.size()
    assert size == sum(len(query.positives) for query in collection.queries)
    epochs = [
        [(pair.query, pair.document) for pair in mixture.pairs(range(e * size, (e + 1) * size))]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == size
    assert epochs[0] != epochs[1]


def test_a_mixture_keeps_its_weights_whatever_the_sizes() -> None:
    small, large = word_collection(documents=5, queries=5), word_collection(documents=90, queries=90, seed=1)
    mixture = Mixture(collections=(small, large), weights=(3.0, 1.0), seed=0)
    counts = Counter(pair.set for pair in mixture.pairs(range(400)))
    assert counts == {0: 300, 1: 100}
    even = Counter(pair.set for pair in Mixture(collections=(small, large), seed=0).pairs(range(950)))
    assert even == {0: 50, 1: 900}


def test_pairs_that_stand_together_are_of_one_set() -> None:
    small, large = word_collection(documents=5, queries=5), word_collection(documents=90, queries=90, seed=1)
    mixture = Mixture(collections=(small, large), weights=(3.0, 1.0), together=8, seed=0)
    batches = [mixture.pairs(range(start, start + 8)) for start in range(0, 320, 8)]
    assert {len({pair.set for pair in batch}) for batch in batches} == {1}
    assert Counter(batch[0].set for batch in batches) == {0: 30, 1: 10}
    # Each set's own order is what it is alone.
    for number, alone in enumerate((small, large)):
        found = [(pair.query, pair.document) for batch in batches for pair in batch if pair.set == number]
        seed = mixture.seed + number
        assert found == [
            (pair.query, pair.document)
            for pair in Mixture(collections=(alone,), seed=seed).pairs(range(len(found)))
        ]
    assert [pair.place for batch in batches for pair in batch] == list(range(320))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -2.0)])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    collection = word_collection(documents=5, queries=5)
    with pytest.raises(UserError, match=r"data\.weights"):
        Mixture(collections=(collection, collection), weights=weights, seed=0)


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_chunks_hold_the_texts_of_the_batch_in_order(chunk: int) -> None:
    collection = judged_collection()
    made = pipeline((collection,), negatives=2, encode_chunk=chunk)
    batch, pairs = made.batch(1), made.pairs(1)
    assert texts_of(batch.queries) == PROMPTER.direct_rows(
        [collection.queries[pair.query].text for pair in pairs], 24
    )
    bodies = [collection.documents[row].body if row != PAD else "" for row in batch.document_ids]
    assert texts_of(batch.documents) == PROMPTER.direct_rows(bodies, 40)
    for b, pair in enumerate(pairs):
        query = collection.queries[pair.query]
        known = {
            collection.documents[row].doc_id: grade
            for row, grade in zip(batch.known_ids[b], batch.known_relevance[b], strict=True)
            if row >= 0
        }
        in_batch = {collection.documents[row].doc_id for row in batch.document_ids if row != PAD}
        assert known == {doc_id: grade for doc_id, grade in query.positives.items() if doc_id in in_batch}
        assert collection.documents[pair.document].doc_id in known
        place = b // chunk * chunk * 3 + b % chunk
        assert batch.document_ids[place] == pair.document
        mined = [
            collection.documents[int(batch.document_ids[row])].doc_id for row in batch.mined[b] if row != PAD
        ]
        assert set(mined) <= set(query.negatives)
        assert len(set(mined)) == min(2, len(query.negatives))


def test_reply_positions_are_the_queries_closings() -> None:
    collection = judged_collection()
    batch = pipeline((collection,)).batch(0)
    closing = list(PROMPTER.direct.closing)
    at = batch.queries.reply_at[0]
    read = batch.queries.ids[0].ravel()[at[at >= 0]].tolist()
    assert read == closing * 8
    assert batch.documents.reply_at.shape == (1, 0)


def test_a_reasoning_of_the_data_set_is_learnt_and_cut_before_its_closing() -> None:
    collection = judged_collection()
    queries = tuple(
        dataclasses.replace(query, reasoning=f"words about {query.text} " * 9) for query in collection.queries
    )
    made = pipeline((dataclasses.replace(collection, queries=queries),), reasoned=3, max_thought_tokens=20)
    batch, pairs = made.batch(0), made.pairs(0)
    for text, pair in list(zip(texts_of(batch.queries), pairs, strict=True))[5:]:
        thought = PROMPTER.thought_ids(queries[pair.query].reasoning)[:20]
        assert text == PROMPTER.reason_rows([queries[pair.query].text], 24)[0] + thought + list(
            PROMPTER.reason.closing
        )
    assert (batch.queries.prefixes.max(), batch.documents.prefixes.max()) == (1, 0)


def test_known_positives_are_no_negatives_under_another_id() -> None:
    """Queries 0 and 1 have one text, documents 4 and 5 too; a copy of a positive is a negative of query 2."""
    plain = word_collection(documents=10, queries=8)
    documents = list(plain.documents)
    documents[5] = dataclasses.replace(documents[5], text=f"{documents[4].text} ")
    documents[9] = dataclasses.replace(documents[9], text=documents[2].text)
    queries = list(plain.queries)
    queries[1] = dataclasses.replace(queries[1], text=queries[0].text)
    queries[2] = dataclasses.replace(queries[2], negatives=("d9", "d8"))
    collection = dataclasses.replace(plain, documents=tuple(documents), queries=tuple(queries))
    made = pipeline((collection,), negatives=2)
    batch = made.batch(0)
    ids = dict(zip([pair.query for pair in made.pairs(0)], batch.document_ids[:8].tolist(), strict=True))
    known = {
        pair.query: set(row) - {PAD}
        for pair, row in zip(made.pairs(0), batch.known_ids.tolist(), strict=True)
    }
    assert known[0] == known[1] == {ids[0], ids[1]}
    assert ids[4] != ids[5]
    assert known[4] == known[5] == {ids[4], ids[5]}
    assert all(known[i] == {ids[i]} for i in (2, 3, 6, 7))
    mined = {pair.query: row for pair, row in zip(made.pairs(0), batch.mined.tolist(), strict=True)}
    assert [batch.document_ids[row] if row != PAD else PAD for row in mined[2]] == [8, PAD]
    # With other instructions they are other queries; the two copies of a document are still one text.
    queries[1] = dataclasses.replace(queries[1], instruction="find code")
    batch = pipeline((dataclasses.replace(collection, queries=tuple(queries)),)).batch(0)
    assert (batch.known_ids >= 0).sum() == 8 + 2


def test_an_instruction_stands_before_the_query() -> None:
    plain = word_collection(documents=8, queries=8)
    instructed, written = (
        dataclasses.replace(
            plain, queries=tuple(dataclasses.replace(query, **change(query)) for query in plain.queries)
        )
        for change in (
            lambda query: {"instruction": "find code"},
            lambda query: {"text": f"Instruct: find code\nQuery: {query.text}"},
        )
    )
    batches = [pipeline((each,), max_query_tokens=64).batch(0) for each in (plain, instructed, written)]
    np.testing.assert_array_equal(batches[1].queries.ids, batches[2].queries.ids)
    assert not np.array_equal(batches[0].queries.ids, batches[1].queries.ids)


def test_a_text_of_two_sets_is_known_in_both() -> None:
    first, second = word_collection(documents=4, queries=4), word_collection(documents=6, queries=4)
    made = pipeline((first, second))
    pairs, batch = made.pairs(0), made.batch(0)
    assert {pair.set for pair in pairs} == {0, 1}
    bodies = [document.body for document in (*first.documents, *second.documents)]
    for pair, number, known in zip(pairs, batch.document_ids, batch.known_ids.tolist(), strict=False):
        assert number == 4 * pair.set + pair.document
        # The same query in the other set has the same text, and so has its document.
        same = {int(other) for other in batch.document_ids if bodies[other] == bodies[number]}
        assert set(known) - {PAD} == same
    assert any(len(set(known) - {PAD}) > 1 for known in batch.known_ids.tolist())


def test_a_text_of_many_copies_makes_no_row_longer_than_the_batch() -> None:
    plain = word_collection(documents=100, queries=8)
    documents = [dataclasses.replace(each, text="Deleted.") for each in plain.documents[:90]]
    collection = dataclasses.replace(plain, documents=(*documents, *plain.documents[90:]))
    batch = pipeline((collection,)).batch(0)
    assert batch.known_ids.shape == (8, 8)
    assert all(set(known) == set(batch.document_ids.tolist()) for known in batch.known_ids.tolist())


@pytest.mark.parametrize("name", ["cosqa", "medquad", "scifact", "squad_sent", "strategyqa"])
def test_little_of_a_real_batch_is_padding(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    made = pipeline(
        (load_collection(SHARED / name, "train"),),
        global_batch=64,
        encode_chunk=64,
        max_query_tokens=256,
        max_document_tokens=1024,
    )
    assert np.mean([made.batch(step).padding_share() for step in range(4)]) <= 0.15
