"""TREC files of an evaluation, measured by pytrec_eval."""

from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval

from search_r3_jax.evaluation.metrics import METRICS

TREC = {
    "ndcg@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "mrr": "recip_rank",
    "map": "map",
}


def read_trec(run_file: Path, qrels_file: Path) -> dict[str, dict[str, float]]:
    """What pytrec_eval says of files on disk, read as any other tool would read them."""
    run: dict[str, dict[str, float]] = {}
    for line in run_file.read_text().splitlines():
        query_id, _, doc_id, rank, score, _ = line.split()
        run.setdefault(query_id, {})[doc_id] = float(score)
        assert int(rank) == len(run[query_id])
    with qrels_file.open() as opened:
        qrels = pytrec_eval.parse_qrel(opened)
    return pytrec_eval.RelevanceEvaluator(
        qrels, {"ndcg_cut.10", "recall.10,100", "recip_rank", "map"}
    ).evaluate(run)


def assert_same_as_files(values: dict[str, Any], run_file: Path, qrels_file: Path) -> None:
    measured = read_trec(run_file, qrels_file)
    assert set(values["per_query"]) == set(measured)
    for name in METRICS:
        for query_id, entry in values["per_query"].items():
            assert entry[name] == measured[query_id][TREC[name]]
        assert values[name] == np.mean([measured[query_id][TREC[name]] for query_id in values["per_query"]])
