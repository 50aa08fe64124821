"""Ranking metrics through pytrec_eval, and TREC run files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytrec_eval

from search_r3_jax.errors import UserError

Run = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over queries, or one query's values; all in [0, 1]."""

    ndcg_at_10: float
    recall_at_10: float
    mrr: float

    def as_dict(self) -> dict[str, float]:
        """The metrics under their usual names."""
        return {"ndcg@10": self.ndcg_at_10, "recall@10": self.recall_at_10, "mrr": self.mrr}


NOTHING_FOUND = Metrics(ndcg_at_10=0.0, recall_at_10=0.0, mrr=0.0)


def evaluate_run(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> tuple[Metrics, dict[str, Metrics]]:
    """The mean over all queries of `qrels`, and each query's metrics; a query that `run` lacks counts as 0.

    trec_eval ranks by float32 score and, among equal scores, by descending document id. MRR looks as deep as the run.
    Raises UserError when there are no judged queries.
    """
    if not qrels:
        raise UserError("qrels: no judged queries; choose a split that has some")
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query_id: dict(judged) for query_id, judged in qrels.items()}, {"ndcg_cut.10", "recall.10", "recip_rank"}
    )
    answered = {query_id: _plain_floats(run[query_id]) for query_id in qrels if run.get(query_id)}
    results = evaluator.evaluate(answered) if answered else {}
    of_query = {query_id: _metrics(results[query_id]) if query_id in results else NOTHING_FOUND for query_id in qrels}
    return _mean(of_query.values()), of_query


def run_from_scores(query_ids: Sequence[str], doc_ids: Sequence[str], scores: np.ndarray, rows: np.ndarray) -> Run:
    """A run from `scores` [Q,k] and corpus `rows` [Q,k]; row −1 means that nothing was found there."""
    scores, rows = np.asarray(scores), np.asarray(rows)
    if scores.shape != rows.shape or len(rows) != len(query_ids):
        raise ValueError(f"expected scores and rows [{len(query_ids)}, k], got {scores.shape} and {rows.shape}")
    return {
        query_id: {doc_ids[int(row)]: float(score) for score, row in zip(query_scores, query_rows, strict=True) if row >= 0}
        for query_id, query_scores, query_rows in zip(query_ids, scores, rows, strict=True)
    }


def write_trec_run(path: Path | str, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Writes `query Q0 document rank score tag` lines in trec_eval's order; raises UserError for ids with white space."""
    path = Path(path)
    lines: list[str] = []
    for query_id, scores in run.items():
        ranked = sorted(scores.items(), key=lambda item: (np.float32(item[1]), item[0]), reverse=True)
        for rank, (doc_id, score) in enumerate(ranked, start=1):
            for value in (query_id, doc_id, tag):
                if value.split() != [value]:
                    raise UserError(f"{path}, line {len(lines) + 1}: {value!r} is empty or has white space; rename it")
            lines.append(f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain_floats(scores: Mapping[str, float]) -> dict[str, float]:
    # pytrec_eval rejects numpy scalars.
    return {doc_id: float(score) for doc_id, score in scores.items()}


def _metrics(measured: Mapping[str, float]) -> Metrics:
    return Metrics(ndcg_at_10=measured["ndcg_cut_10"], recall_at_10=measured["recall_10"], mrr=measured["recip_rank"])


def _mean(metrics: Iterable[Metrics]) -> Metrics:
    values = np.array([[each.ndcg_at_10, each.recall_at_10, each.mrr] for each in metrics], np.float64)
    ndcg_at_10, recall_at_10, mrr = values.mean(axis=0).tolist()
    return Metrics(ndcg_at_10=ndcg_at_10, recall_at_10=recall_at_10, mrr=mrr)
