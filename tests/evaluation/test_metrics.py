import dataclasses
import io
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from helpers.tiny_models import word_collection

from search_r3_jax.data.collection import Document, Query
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.bm25 import bm25_run
from search_r3_jax.evaluation.metrics import (
    METRICS,
    check_trec_ids,
    evaluate_run,
    qrels_text,
    run_from_scores,
    run_text,
    without_identical_ids,
)

REAL_DATA = Path(os.environ.get("SEARCH_R3_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def by_hand(judged: dict[str, int], scores: dict[str, float]) -> dict[str, float]:
    ranked = sorted(scores, key=lambda doc_id: (scores[doc_id], doc_id), reverse=True)
    gain = sum(judged.get(doc_id, 0) / math.log2(rank + 2) for rank, doc_id in enumerate(ranked[:10]))
    ideal = sum(
        value / math.log2(rank + 2) for rank, value in enumerate(sorted(judged.values(), reverse=True)[:10])
    )
    relevant = {doc_id for doc_id, value in judged.items() if value > 0}
    hits = [rank for rank, doc_id in enumerate(ranked, start=1) if doc_id in relevant]
    first = next((rank for rank, doc_id in enumerate(ranked, start=1) if doc_id in relevant), None)
    return {
        "ndcg@10": gain / ideal,
        "recall@10": len(relevant & set(ranked[:10])) / len(relevant),
        "recall@100": len(relevant & set(ranked[:100])) / len(relevant),
        "mrr": 1 / first if first else 0.0,
        "map": sum(found / rank for found, rank in enumerate(hits, start=1)) / len(relevant),
    }


def test_agrees_with_a_hand_computation_on_random_graded_judgements() -> None:
    rng = random.Random(5)
    documents = [f"d{number}" for number in range(160)]
    qrels, run = {}, {}
    for query in range(50):
        judged = rng.sample(documents, rng.randint(1, 60))
        qrels[f"q{query}"] = {doc_id: rng.randint(1, 3) for doc_id in judged}
        found = rng.sample(documents, rng.randint(1, 150))
        run[f"q{query}"] = dict(zip(found, rng.sample(range(1000), len(found)), strict=True))
    del run["q7"]
    run["q8"] = {}
    run["unjudged"] = {"d1": 1.0}
    mean, of_query = evaluate_run(qrels, run)
    expected = {query_id: by_hand(qrels[query_id], run.get(query_id, {})) for query_id in qrels}
    assert set(of_query) == set(qrels)
    assert of_query["q7"].as_dict() == of_query["q8"].as_dict() == dict.fromkeys(METRICS, 0.0)
    for query_id in qrels:
        assert of_query[query_id].as_dict() == pytest.approx(expected[query_id], abs=1e-12)
    for key, value in mean.as_dict().items():
        assert value == pytest.approx(np.mean([each[key] for each in expected.values()]), abs=1e-12)
    assert 0.05 < mean.ndcg_at_10 < 0.95


def test_ties_follow_trec_eval() -> None:
    # 1 + 1e-9 is 1 in float32: the higher document id comes first.
    _, of_query = evaluate_run({"q": {"a": 1}}, {"q": {"a": 1.0 + 1e-9, "b": 1.0}})
    assert of_query["q"].mrr == 0.5


def test_no_judged_queries_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no judged queries"):
        evaluate_run({}, {"q": {"a": 1.0}})


def test_run_from_scores_skips_empty_places() -> None:
    scores = np.array([[0.5, 0.25], [0.75, -np.inf]], np.float32)
    rows = np.array([[2, 0], [1, -1]])
    run = run_from_scores(["q1", "q2"], ["a", "b", "c"], scores, rows)
    assert run == {"q1": {"c": 0.5, "a": 0.25}, "q2": {"b": 0.75}}
    with pytest.raises(ValueError, match="expected scores and rows"):
        run_from_scores(["q1"], ["a", "b", "c"], scores, rows)


def test_trec_run_reads_back_in_rank_order() -> None:
    run = {"q1": {"a": 0.1, "b": np.float32(0.7), "c": 0.1}, "q2": {"a": -2.5}}
    text = run_text(run, "tag")
    assert pytrec_eval.parse_run(io.StringIO(text)) == run
    assert [line.split()[2:4] for line in text.splitlines()] == [
        ["b", "1"],
        ["c", "2"],
        ["a", "3"],
        ["a", "1"],
    ]
    qrels = {"q1": {"a": 2, "b": 0}, "q2": {"gone": 1}}
    assert pytrec_eval.parse_qrel(io.StringIO(qrels_text(qrels))) == qrels


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("document", {"documents": (Document(doc_id="a b", title="", text="x"),)}),
        ("query", {"queries": (Query(query_id="q\u2028", text="x", positives={"d0": 1}),)}),
        ("judged document", {"queries": (Query(query_id="q", text="x", positives={"gone away": 1}),)}),
    ],
)
def test_ids_that_a_trec_file_cannot_hold_are_refused(kind: str, change: dict[str, Any]) -> None:
    collection = word_collection(documents=4, queries=2)
    check_trec_ids("--run-file", collection)
    with pytest.raises(UserError, match=f"--run-file: words: {kind} id .* has white space"):
        check_trec_ids("--run-file", dataclasses.replace(collection, **change))


def test_real_set_agrees_with_a_hand_computation() -> None:
    folder = REAL_DATA / "conala"
    if not folder.is_dir():
        pytest.skip("no conala in SEARCH_R3_DATA")
    collection = load_collection(folder, "test")
    qrels, run = collection.qrels(), bm25_run(collection, identifiers=True, k=50)
    mean, _ = evaluate_run(qrels, run)
    rounded = {
        query_id: {doc_id: float(np.float32(value)) for doc_id, value in scores.items()}
        for query_id, scores in run.items()
    }
    expected = [by_hand(judged, rounded[query_id]) for query_id, judged in qrels.items()]
    for key, value in mean.as_dict().items():
        assert value == pytest.approx(np.mean([each[key] for each in expected]), abs=1e-12)
    assert mean.ndcg_at_10 > 0.4


def test_identical_ids_make_room_for_the_next_document() -> None:
    run = {"a": {"x": 3.0, "a": 2.0, "y": 1.0}, "b": {"x": 3.0, "y": 2.0, "a": 1.0}, "c": {}}
    expected = {"a": {"x": 3.0, "y": 1.0}, "b": {"x": 3.0, "y": 2.0}, "c": {}}
    assert without_identical_ids(run, depth=2) == expected
