"""`search-r3 eval` on cut and on published data: the same queries, documents and judgements as elsewhere."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from helpers.trec_files import assert_same_as_files

from search_r3_jax.data.build import build_beir
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings


def test_baselines_see_the_same_cut(tiny_folders: dict[str, Path], beir: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"data": beir, "max_documents": 60}
    bm25 = run_evaluation(EvalSettings(model="bm25", run_file=tmp_path / "b.run", **small))
    split = run_evaluation(EvalSettings(model="bm25-split", **small))
    ours = run_evaluation(EvalSettings(model=str(tiny_folders["llama"]), index="scann", **small))
    assert bm25["data"] == split["data"] == ours["data"]
    assert bm25["data"]["cut"] | {"ids_sha256": ""} == {
        "asked": 60,
        "documents": 60,
        "whole": 130,
        "judged": 36,
        "seed": 0,
        "ids_sha256": "",
    }
    assert_same_as_files(bm25["modes"]["direct"], tmp_path / "b.run", tmp_path / "b.run.qrels")
    # A query is two words of its own document.
    assert bm25["modes"]["direct"]["recall@10"] == 0.5


def test_more_judged_than_asked_is_said(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_evaluation(EvalSettings(model="bm25", data=beir, max_documents=5))
    assert record["data"]["documents"] == 36
    assert "36 documents are judged: all of them stay, more than the 5 asked for" in capsys.readouterr().err


def test_fewer_queries_give_what_each_of_them_gave(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run_evaluation(EvalSettings(model="bm25", data=beir))
    assert (whole["data"]["query_cut"], whole["data"]["cut"]) == (None, None)
    few = run_evaluation(EvalSettings(model="bm25", data=beir, max_queries=5, seed=2))
    assert few["data"]["query_cut"] == {"queries": 5, "whole": 12, "seed": 2}
    assert "5 of 12 queries" in capsys.readouterr().out
    of_query = few["modes"]["direct"]["per_query"]
    assert len(of_query) == 5
    assert of_query == {query_id: whole["modes"]["direct"]["per_query"][query_id] for query_id in of_query}
    # Only what these judge has to stay.
    small = run_evaluation(EvalSettings(model="bm25", data=beir, max_queries=5, seed=2, max_documents=20))
    assert (small["data"]["cut"]["judged"], small["data"]["documents"]) == (15, 20)
    assert set(small["modes"]["direct"]["per_query"]) == set(of_query)


def write_published(folder: Path, beir: Path) -> dict[str, dict[str, int]]:
    """`beir` as collections are published: an empty document, a query without a relevant document, and
    judgements of documents that are not there; the judgements as trec_eval reads them."""
    shutil.copytree(beir, folder)
    with (folder / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "empty", "title": "", "text": ""}\n')
    qrels = folder / "qrels" / "test.tsv"
    rows = [line for line in qrels.read_text().splitlines()[1:] if not line.startswith("q3\t")]
    rows += ["q3\td3\t0", "q0\tgone\t2", "q1\tgone too\t1", "q2\tempty\t1", "q5\td9\t-1"]
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    judged: dict[str, dict[str, int]] = {}
    for row in rows:
        query_id, doc_id, score = row.split("\t")
        judged.setdefault(query_id, {})[doc_id] = int(score)
    return judged


def trec_means(
    judged: dict[str, dict[str, int]], per_query: dict[str, dict[str, Any]]
) -> tuple[float, set[str]]:
    """pytrec_eval's mean nDCG@10 of the ten best documents over all judged queries."""
    run = {query_id: dict(entry["top"]) for query_id, entry in per_query.items()}
    measured = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
    return float(np.mean([each["ndcg_cut_10"] for each in measured.values()])), set(measured)


def test_published_judgements_count_as_trec_eval_counts_them(beir: Path, tmp_path: Path) -> None:
    judged = write_published(tmp_path / "published", beir)
    build_beir(tmp_path / "published", tmp_path / "built", skip_bad=True)
    for folder in ("published", "built"):
        record = run_evaluation(EvalSettings(model="bm25-split", data=tmp_path / folder))
        values = record["modes"]["direct"]
        expected, queries = trec_means(judged, values["per_query"])
        assert set(values["per_query"]) == queries == set(judged)
        assert values["ndcg@10"] == pytest.approx(expected, abs=1e-12)
        assert values["per_query"]["q3"]["ndcg@10"] == 0.0
    # Fewer queries and documents of the same judgements.
    few = run_evaluation(
        EvalSettings(model="bm25-split", data=tmp_path / "published", max_queries=6, max_documents=60, seed=1)
    )
    values = few["modes"]["direct"]
    assert few["data"]["documents"] == 60
    chosen = {query_id: judged[query_id] for query_id in values["per_query"]}
    assert values["ndcg@10"] == pytest.approx(trec_means(chosen, values["per_query"])[0], abs=1e-12)


def test_documents_that_are_the_query_itself_are_left_out_as_beir_does(beir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    shutil.copytree(beir, folder)
    # As in ArguAna: each query stands in the corpus, under its own id.
    with (folder / "corpus.jsonl").open("a") as corpus:
        corpus.writelines(line + "\n" for line in (folder / "queries.jsonl").read_text().splitlines())
    plain = tmp_path / "plain.run"
    asked = EvalSettings(model="bm25", data=folder, run_file=plain, out=tmp_path / "a.json")
    before = run_evaluation(asked)["modes"]["direct"]
    left_out = dataclasses.replace(asked, ignore_identical_ids=True, run_file=tmp_path / "a.run")
    record = run_evaluation(left_out)
    after = record["modes"]["direct"]
    # From the plain run, as BEIR and MTEB do it.
    others = [line for line in plain.read_text().splitlines() if line.split()[0] != line.split()[2]]
    assert len(others) == len(plain.read_text().splitlines()) - 12
    run: dict[str, dict[str, float]] = {}
    for line in others:
        query_id, _, doc_id, _, score, _ = line.split()
        run.setdefault(query_id, {})[doc_id] = float(score)
    with (tmp_path / "plain.run.qrels").open() as opened:
        measured = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(opened), {"ndcg_cut.10"}).evaluate(
            run
        )
    assert after["ndcg@10"] == np.mean([measured[query_id]["ndcg_cut_10"] for query_id in after["per_query"]])
    assert after["ndcg@10"] > before["ndcg@10"]
    assert_same_as_files(after, tmp_path / "a.run", tmp_path / "a.run.qrels")
    assert record["data"]["ignore_identical_ids"]
