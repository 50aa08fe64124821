"""Ranking metrics through pytrec_eval, and TREC run files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytrec_eval

from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import UserError

Run = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over queries, or one query's values; all in [0, 1]. MRR and MAP use the whole run."""

    ndcg_at_10: float
    recall_at_10: float
    recall_at_100: float
    mrr: float
    map: float

    def as_dict(self) -> dict[str, float]:
        """The metrics under their usual names, those of `METRICS`."""
        values = (self.ndcg_at_10, self.recall_at_10, self.recall_at_100, self.mrr, self.map)
        return dict(zip(METRICS, values, strict=True))


METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr", "map")
ZERO_METRICS = Metrics(ndcg_at_10=0.0, recall_at_10=0.0, recall_at_100=0.0, mrr=0.0, map=0.0)
# Their names in trec_eval.
_MEASURES = {"ndcg_cut.10", "recall.10,100", "recip_rank", "map"}


def evaluate_run(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> tuple[Metrics, dict[str, Metrics]]:
    """The mean over all queries of `qrels`, and each query's metrics; a query missing in `run` counts as 0.

    trec_eval ranks by float32 score and, among equal scores, by descending document id.
    Raises UserError when there are no judged queries.
    """
    if not qrels:
        raise UserError("qrels: no judged queries; choose a split that has some")
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query_id: dict(judged) for query_id, judged in qrels.items()}, _MEASURES
    )
    answered = {query_id: _plain_floats(run[query_id]) for query_id in qrels if run.get(query_id)}
    results = evaluator.evaluate(answered) if answered else {}
    of_query = {
        query_id: _metrics(results[query_id]) if query_id in results else ZERO_METRICS for query_id in qrels
    }
    return _mean(of_query.values()), of_query


def run_from_scores(
    query_ids: Sequence[str], doc_ids: Sequence[str], scores: np.ndarray, rows: np.ndarray
) -> Run:
    """A run from `scores` [Q,k] and corpus `rows` [Q,k]; row −1 marks an empty place."""
    scores, rows = np.asarray(scores), np.asarray(rows)
    if scores.shape != rows.shape or len(rows) != len(query_ids):
        raise ValueError(
            f"expected scores and rows [{len(query_ids)}, k], got {scores.shape} and {rows.shape}"
        )
    return {
        query_id: {
            doc_ids[int(row)]: float(score)
            for score, row in zip(query_scores, query_rows, strict=True)
            if row >= 0
        }
        for query_id, query_scores, query_rows in zip(query_ids, scores, rows, strict=True)
    }


def without_identical_ids(run: Run, *, depth: int) -> Run:
    """The `depth` best documents of each query, without the one that has the query's id."""
    return {
        query_id: dict([pair for pair in scores.items() if pair[0] != query_id][:depth])
        for query_id, scores in run.items()
    }


def check_trec_ids(flag: str, collection: Collection) -> None:
    """Raise UserError if an id cannot stand in a TREC file, whose fields end at white space."""
    ids = {"document": [document.doc_id for document in collection.documents]}
    ids["query"] = [query.query_id for query in collection.queries]
    ids["judged document"] = [doc_id for judged in collection.qrels().values() for doc_id in judged]
    for kind, values in ids.items():
        for value in values:
            if value.split() != [value]:
                raise UserError(
                    f"{flag}: {collection.name}: {kind} id {value!r} is empty or has white space, which a "
                    "TREC file cannot hold; rename it, or leave the option out"
                )


def run_text(run: Mapping[str, Mapping[str, float]], tag: str) -> str:
    """Lines `query Q0 document rank score tag` in trec_eval's order."""
    lines: list[str] = []
    for query_id, scores in run.items():
        ranked = sorted(scores.items(), key=lambda item: (np.float32(item[1]), item[0]), reverse=True)
        lines += [
            f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n"
            for rank, (doc_id, score) in enumerate(ranked, start=1)
        ]
    return "".join(lines)


def qrels_text(qrels: Mapping[str, Mapping[str, int]]) -> str:
    """Lines `query 0 document relevance`."""
    return "".join(
        f"{query_id} 0 {doc_id} {relevance}\n"
        for query_id, judged in qrels.items()
        for doc_id, relevance in judged.items()
    )


def _plain_floats(scores: Mapping[str, float]) -> dict[str, float]:
    # pytrec_eval rejects numpy scalars.
    return {doc_id: float(score) for doc_id, score in scores.items()}


def _metrics(measured: Mapping[str, float]) -> Metrics:
    return Metrics(
        ndcg_at_10=measured["ndcg_cut_10"],
        recall_at_10=measured["recall_10"],
        recall_at_100=measured["recall_100"],
        mrr=measured["recip_rank"],
        map=measured["map"],
    )


def _mean(metrics: Iterable[Metrics]) -> Metrics:
    # One metric at a time, as pytrec_eval does: over an axis NumPy rounds differently in the last digit.
    columns = zip(*(each.as_dict().values() for each in metrics), strict=True)
    ndcg_at_10, recall_at_10, recall_at_100, mrr, average_precision = (
        float(np.mean(column)) for column in columns
    )
    return Metrics(
        ndcg_at_10=ndcg_at_10,
        recall_at_10=recall_at_10,
        recall_at_100=recall_at_100,
        mrr=mrr,
        map=average_precision,
    )
