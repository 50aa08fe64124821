import dataclasses
import random

from helpers.tiny_models import word_collection

from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.subsample import (
    sample_corpus,
    sample_queries,
    unordered_documents_hash,
    unordered_queries_hash,
)


def judged_collection() -> Collection:
    made = word_collection(documents=200, queries=10, split="test")
    asked = Query(query_id="graded", text="x", positives={"d150": 2}, negatives=("d160", "d161"))
    return dataclasses.replace(made, queries=(*made.queries, asked))


def shuffled(made: Collection) -> Collection:
    documents, queries = list(made.documents), list(made.queries)
    random.Random(1).shuffle(documents)
    random.Random(2).shuffle(queries)
    return dataclasses.replace(made, documents=tuple(documents), queries=tuple(queries))


def ids(made: Collection) -> set[str]:
    return {document.doc_id for document in made.documents}


def test_keeps_judged_documents_and_does_not_depend_on_order() -> None:
    made = judged_collection()
    small, cut = sample_corpus(made, 40)
    assert len(small.documents) == 40
    assert ids(small) >= {*(f"d{i}" for i in range(10)), "d150", "d160", "d161"}
    assert (cut.asked, cut.documents, cut.whole, cut.judged, cut.seed) == (40, 40, 200, 13, 0)
    assert [d for d in made.documents if d.doc_id in ids(small)] == list(small.documents)
    again, same = sample_corpus(shuffled(made), 40)
    assert ids(again) == ids(small)
    assert same == cut
    assert unordered_documents_hash(again) == unordered_documents_hash(small)
    assert unordered_queries_hash(again) == unordered_queries_hash(small)


def test_seeds_draw_others_and_a_larger_cut_holds_the_smaller() -> None:
    made = judged_collection()
    small, cut = sample_corpus(made, 40)
    other, other_cut = sample_corpus(made, 40, seed=1)
    assert ids(other) != ids(small)
    assert other_cut.ids_sha256 != cut.ids_sha256
    assert ids(sample_corpus(made, 60)[0]) > ids(small)


def test_fewer_queries_whatever_their_order() -> None:
    made = word_collection(documents=200, queries=40, split="test")
    few, cut = sample_queries(made, 12)
    assert (cut.queries, cut.whole, cut.seed) == (12, 40, 0)
    asked = [query.query_id for query in few.queries]
    assert [query.query_id for query in made.queries if query.query_id in asked] == asked
    assert few.documents == made.documents
    assert {query.query_id for query in sample_queries(shuffled(made), 12)[0].queries} == set(asked)
    assert {query.query_id for query in sample_queries(made, 20)[0].queries} > set(asked)
    assert {query.query_id for query in sample_queries(made, 12, seed=1)[0].queries} != set(asked)
    assert sample_queries(made, 41)[0] == made


def test_draws_evenly() -> None:
    made = word_collection(documents=200, queries=1)
    counts = dict.fromkeys(ids(made), 0)
    for seed in range(200):
        for doc_id in ids(sample_corpus(made, 51, seed=seed)[0]):
            counts[doc_id] += 1
    assert counts.pop("d0") == 200
    # A quarter of 200 draws, five standard deviations around.
    assert all(20 < count < 81 for count in counts.values())


def test_more_judged_than_asked_all_stay_and_no_more() -> None:
    made = judged_collection()
    small, cut = sample_corpus(made, 3)
    assert len(small.documents) == cut.documents == cut.judged == 13
    everything, cut = sample_corpus(made, 1000)
    assert everything.documents == made.documents
    assert (cut.documents, cut.whole) == (200, 200)


def test_hashes_see_every_change() -> None:
    made = judged_collection()
    first = dataclasses.replace(made.documents[0], text="other")
    assert unordered_documents_hash(
        dataclasses.replace(made, documents=(first, *made.documents[1:]))
    ) != unordered_documents_hash(made)
    for changed in (
        dataclasses.replace(made.queries[0], text="other"),
        dataclasses.replace(made.queries[0], positives={"d0": 2}),
        dataclasses.replace(made.queries[0], positives={"d1": 1}),
    ):
        assert unordered_queries_hash(
            dataclasses.replace(made, queries=(changed, *made.queries[1:]))
        ) != unordered_queries_hash(made)
