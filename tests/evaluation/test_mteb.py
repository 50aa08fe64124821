"""MTEB on our encoder and on an export: the scores of `eval`, prompts where MTEB's order puts them, results
in its own files."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import pytrec_eval
from helpers.tiny_models import word_collection
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from search_r3_jax import Embedder
from search_r3_jax.data.collection import Collection, Document
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.evaluation.evaluate import EmbeddedQueries, exact_index, search_result
from search_r3_jax.evaluation.mteb_encoder import MtebEncoder, mteb_name
from search_r3_jax.evaluation.mteb_run import collection_task, run_mteb
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings, MtebSettings
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.vectors import unit_vectors

REAL_DATA = Path(os.environ.get("SEARCH_R3_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
# A text's tokens in all that is held against each other here.
TOKENS = 48
THINK_TOKENS = 5
METRICS = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "recall@100": "recall_at_100"}
TASK = collection_task(
    word_collection(documents=12, queries=4, split="test"), prompt="Find the words"
).metadata


@pytest.fixture(scope="module")
def export(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(
        load_model(tiny_folders["llama"]), tmp_path_factory.mktemp("export") / "llama", max_tokens=TOKENS
    )


@pytest.fixture(scope="module")
def mbpp() -> Path:
    if not (REAL_DATA / "mbpp").is_dir():
        pytest.skip(f"{REAL_DATA}: no real collections there")
    return REAL_DATA / "mbpp"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "words"
    build_dataset(
        {"test": word_collection(documents=40, queries=12, split="test")},
        folder,
        name="words",
        source={"kind": "test"},
    )
    return folder


def results_file(out: Path, task: str) -> dict[str, Any]:
    (file,) = out.rglob(f"{task}-*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", pytest.param("reason", marks=pytest.mark.exhaustive)])
def test_a_real_collection_scores_as_eval_scores_it(
    export: Path, mbpp: Path, tmp_path: Path, mode: Any
) -> None:
    limits: dict[str, Any] = {"max_documents": 600, "max_think_tokens": THINK_TOKENS, "mode": mode}
    run_mteb(MtebSettings(model=str(export), data=(mbpp,), out=tmp_path / "mteb", **limits))
    texts: dict[str, Any] = {"max_query_tokens": TOKENS, "max_document_tokens": TOKENS}
    expected = run_evaluation(EvalSettings(model=str(export), data=mbpp, **limits, **texts))["modes"][mode]
    (found,) = results_file(tmp_path / "mteb", "mbpp")["scores"]["test"]
    # MTEB rounds to five digits.
    assert {ours: found[theirs] for ours, theirs in METRICS.items()} == {
        ours: pytest.approx(expected[ours], abs=6e-6) for ours in METRICS
    }
    assert 0 < found["main_score"] == found["ndcg_at_10"] < 1


def test_an_export_scores_the_same_in_sentence_transformers(
    export: Path, words: Path, tmp_path: Path
) -> None:
    (ours,) = run_mteb(MtebSettings(model=str(export), data=(words,), out=tmp_path))
    result = mteb.evaluate(
        SentenceTransformer(str(export)),
        collection_task(load_collection(words, "test")),
        cache=None,
        co2_tracker=False,
    )
    (theirs,) = result.task_results[0].scores["test"]
    assert 0 < ours.scores["ndcg_at_10"] < 1
    for metric in METRICS.values():
        assert ours.scores[metric] == theirs[metric]


def test_what_has_been_evaluated_is_not_evaluated_again(
    export: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = MtebSettings(model=str(export), data=(words,), out=tmp_path)
    (first,) = run_mteb(settings)
    shown = capsys.readouterr().out
    assert "words (test)" in shown
    assert f"{first.scores['ndcg_at_10']:.4f}" in shown
    monkeypatch.setattr(MtebEncoder, "encode", lambda *_, **__: pytest.fail("encoded again"))
    (again,) = run_mteb(settings)
    assert again.scores["ndcg_at_10"] == first.scores["ndcg_at_10"]
    (meta,) = [json.loads(file.read_text()) for file in tmp_path.rglob("model_meta.json")]
    assert meta["name"] == f"{export.parent.name}/llama"
    assert meta["revision"] == Embedder.load(export).model_hash()
    # Another mode is another experiment of the same model.
    monkeypatch.undo()
    run_mteb(
        MtebSettings(
            model=str(export), data=(words,), out=tmp_path, mode="reason", max_think_tokens=THINK_TOKENS
        )
    )
    metas = [json.loads(file.read_text()) for file in tmp_path.rglob("model_meta.json")]
    settings = [
        {name: value for name, value in meta["experiment_kwargs"].items() if name != "sha256"}
        for meta in metas
    ]
    assert sorted(settings, key=len) == [
        {"mode": "direct", "max_tokens": TOKENS},
        {"mode": "reason", "max_tokens": TOKENS, "max_think_tokens": THINK_TOKENS},
    ]


def byte_vectors(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N,256] of how often each byte is in a text."""
    counts = [np.bincount(np.frombuffer(text.encode() + b" ", np.uint8), minlength=256) for text in texts]
    return unit_vectors(np.array(counts, np.float32), str)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of an encoder that makes a vector of a text's bytes, without a model."""
    calls: list[list[str]] = []

    def encode(_: MtebEncoder, inputs: Iterable[dict[str, list[str]]], **__: Any) -> np.ndarray:
        calls.append([text for batch in inputs for text in batch["text"]])
        return byte_vectors(calls[-1])

    monkeypatch.setattr(MtebEncoder, "encode", encode)
    return calls


def test_results_are_kept_by_content(
    export: Path, tmp_path: Path, evaluations: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data under the same name, and other settings or another tokenizer under the same model's name."""
    folders = [tmp_path / parent / "words" for parent in "ab"]
    for folder, documents in zip(folders, (40, 20), strict=True):
        collection = word_collection(documents=documents, queries=12, split="test")
        build_dataset({"test": collection}, folder, name="words", source={"kind": "test"})
    model = tmp_path / "model"
    shutil.copytree(export, model)

    def score(*data: Path, **settings: Any) -> list[float]:
        results = run_mteb(MtebSettings(model=str(model), data=data, out=tmp_path / "kept", **settings))
        return [each.scores["ndcg_at_10"] for each in results]

    (first,) = score(folders[0])
    changes: list[tuple[Path, dict[str, Any]]] = [
        (folders[1], {}),
        (folders[0], {"max_documents": 20}),
        (folders[0], {"max_tokens": 6}),
        (folders[0], {"instruction_template": "a: {instruction}"}),
        # In a folder's name MTEB cannot tell it from the one before.
        (folders[0], {"instruction_template": "a? {instruction}"}),
    ]
    for number, (folder, change) in enumerate(changes, start=2):
        score(folder, **change)
        assert len(evaluations) == 2 * number
    (other,) = score(folders[1])
    capsys.readouterr()
    assert score(*folders) == [first, other]
    assert len(evaluations) == 2 + 2 * len(changes)
    assert first != other
    # Of two collections of one name, the table gives each its task's name.
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "words-" in line]
    assert len(set(shown)) == 2
    assert set(shown) < {file.stem for file in (tmp_path / "kept").rglob("words-*.json")}
    # The same parameters and prompts behind another tokenizer.
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "é"}, "content": "e"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    score(folders[0])
    assert len(evaluations) == 4 + 2 * len(changes)


def test_a_document_that_is_the_query_itself_may_be_left_out(
    export: Path, tmp_path: Path, evaluations: list[list[str]]
) -> None:
    made = word_collection(documents=40, queries=12, split="test")
    copies = (Document(doc_id=query.query_id, title="", text=query.text) for query in made.queries)
    collection = dataclasses.replace(made, documents=(*made.documents, *copies))
    build_dataset({"test": collection}, tmp_path / "words", name="words", source={"kind": "test"})
    found = []
    for left_out in (False, True):
        settings = MtebSettings(
            model=str(export),
            data=(tmp_path / "words",),
            out=tmp_path / "kept",
            ignore_identical_ids=left_out,
        )
        found.append(run_mteb(settings)[0].scores["ndcg_at_10"])
        scores = byte_vectors([query.text for query in made.queries]) @ (
            byte_vectors([document.body for document in collection.documents]).T
        )
        run = {
            query.query_id: {
                document.doc_id: float(score)
                for document, score in zip(collection.documents, row, strict=True)
                if not (left_out and document.doc_id == query.query_id)
            }
            for query, row in zip(collection.queries, scores, strict=True)
        }
        measured = pytrec_eval.RelevanceEvaluator(collection.qrels(), {"ndcg_cut.10"}).evaluate(run)
        expected = np.mean([each["ndcg_cut_10"] for each in measured.values()])
        assert found[-1] == pytest.approx(expected, abs=1e-5)
    assert found[1] > found[0]


def test_results_of_another_revision_of_the_data_are_replaced(
    export: Path, tmp_path: Path, evaluations: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [
        collection_task(word_collection(documents=documents, queries=12, split="test"))
        for documents in (40, 20)
    ]
    for task in tasks:
        task.metadata.name = "words"
    found = []
    for task in tasks:
        monkeypatch.setattr(mteb, "get_task", lambda _, task=task: task)
        found.append(run_mteb(MtebSettings(model=str(export), tasks=("words",), out=tmp_path))[0].scores)
    assert found[0]["ndcg_at_10"] != found[1]["ndcg_at_10"]
    assert len(evaluations) == 4


def test_published_judgements_count_as_eval_counts_them(
    export: Path, tmp_path: Path, evaluations: list[list[str]]
) -> None:
    """An empty document, a query without a relevant one, a judgement of a document that is not there."""
    made = word_collection(documents=30, queries=8, split="test")
    (tmp_path / "words" / "qrels").mkdir(parents=True)
    documents = [{"_id": each.doc_id, "text": each.text} for each in made.documents]
    queries = [{"_id": each.query_id, "text": each.text} for each in made.queries]
    qrels = [f"{each.query_id}\t{doc_id}\t1" for each in made.queries[1:] for doc_id in each.positives]
    qrels += [f"{made.queries[0].query_id}\td0\t0", f"{made.queries[1].query_id}\tgone\t1"]
    for name, lines in {
        "corpus.jsonl": map(json.dumps, [*documents, {"_id": "empty", "text": ""}]),
        "queries.jsonl": map(json.dumps, queries),
        "qrels/test.tsv": qrels,
    }.items():
        (tmp_path / "words" / name).write_text("".join(f"{line}\n" for line in lines))
    (found,) = run_mteb(MtebSettings(model=str(export), data=(tmp_path / "words",), out=tmp_path / "mteb"))
    collection = load_collection(tmp_path / "words", "test")
    documents = [document.body for document in collection.documents]
    texts = [query.text for query in collection.queries]
    assert sorted(map(len, evaluations)) == [len(texts), len(documents)]
    vectors = EmbeddedQueries(vectors=byte_vectors(texts), seconds=1.0, warm_seconds=1.0)
    expected = search_result(collection, exact_index(collection, byte_vectors(documents)), vectors)
    for ours, theirs in METRICS.items():
        assert found.scores[theirs] == pytest.approx(expected.metrics.as_dict()[ours], abs=6e-6)
    assert 0 < found.scores["ndcg_at_10"] < 1


class Batches:
    """What MTEB hands to an encoder, two rows at a time."""

    def __init__(self, **columns: list[str]):
        self._columns = columns

    def __iter__(self) -> Iterator[dict[str, list[str]]]:
        for start in range(0, len(next(iter(self._columns.values()))), 2):
            yield {name: values[start : start + 2] for name, values in self._columns.items()}


def encoded(encoder: MtebEncoder, prompt_type: PromptType | None, **columns: list[str]) -> np.ndarray:
    return encoder.encode(
        Batches(**columns),
        task_metadata=TASK,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        show_progress_bar=False,
    )


TEXTS = ["copper kettle", "an old map", "why is the sea salt"]


def test_only_what_is_searched_for_is_thought_about(export: Path) -> None:
    encoder = MtebEncoder(str(export), mode="reason", max_think_tokens=THINK_TOKENS)
    assert isinstance(encoder, EncoderProtocol)
    embedder = Embedder.load(export, max_think_tokens=THINK_TOKENS)
    direct, reasoned = embedder.encode(TEXTS), embedder.encode(TEXTS, mode="reason")
    assert np.abs(direct - reasoned).max() > 1e-2
    np.testing.assert_array_equal(encoded(encoder, PromptType.query, text=TEXTS), reasoned)
    np.testing.assert_array_equal(encoded(encoder, PromptType.document, text=TEXTS), direct)
    # A symmetric task, as of similar sentences.
    np.testing.assert_array_equal(encoded(encoder, None, text=TEXTS), direct)


def test_titles_stand_where_training_put_them(export: Path) -> None:
    titles = ["Kitchen", "", "Oceans"]
    joined = [f"Kitchen\n{TEXTS[0]}", TEXTS[1], f"Oceans\n{TEXTS[2]}"]
    columns = {
        "title": titles,
        "body": TEXTS,
        "text": [f"{title} {text}" for title, text in zip(titles, TEXTS, strict=True)],
    }
    found = encoded(MtebEncoder(str(export)), PromptType.document, **columns)
    np.testing.assert_array_equal(found, Embedder.load(export).encode(joined, kind="document"))


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        (None, "Instruct: Find the words; ", ""),
        ({"query": "q: "}, "q: ", ""),
        ({"query": "q: ", "Retrieval": "all: "}, "all: ", "all: "),
        ({"Retrieval-query": "rq: ", "Retrieval": "all: ", "document": "d: "}, "rq: ", "all: "),
    ],
)
def test_prompts_and_instructions_stand_before_texts(
    export: Path, prompts: dict[str, str] | None, query: str, document: str
) -> None:
    encoder = MtebEncoder(str(export), prompts=prompts, instruction_template="Instruct: {instruction}; ")
    embedder = Embedder.load(export)
    found = encoded(encoder, PromptType.query, text=TEXTS)
    np.testing.assert_array_equal(found, embedder.encode([query + text for text in TEXTS]))
    found = encoded(encoder, PromptType.document, text=TEXTS)
    np.testing.assert_array_equal(
        found, embedder.encode([document + text for text in TEXTS], kind="document")
    )
    # Without any of them texts stand alone.
    np.testing.assert_array_equal(
        encoded(MtebEncoder(str(export)), PromptType.query, text=TEXTS), embedder.encode(TEXTS)
    )


def test_a_task_is_the_collection(words: Path) -> None:
    collection: Collection = load_collection(words, "test")
    task = collection_task(collection, prompt="Find the words")
    task.load_data()
    data = task.dataset["default"]["test"]
    assert data["corpus"]["text"] == [document.body for document in collection.documents]
    assert dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True)) == {
        each.query_id: each.text for each in collection.queries
    }
    assert data["relevant_docs"] == collection.qrels()
    assert task.metadata.prompt == {"query": "Find the words"}


def test_names_have_an_organisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert mteb_name("mine") == "runs/mine"
    assert mteb_name("mine/../mine/") == "runs/mine"
    assert mteb_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert mteb_name("smollm2") == "search_r3_jax/smollm2"


def test_mistakes_are_one_line(export: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="mteb: nothing to evaluate; name tasks with --tasks, or data sets of this machine with --data",
    ):
        run_mteb(MtebSettings(model=str(export), out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"--tasks: .*SciFakt"):
        run_mteb(MtebSettings(model=str(export), tasks=("SciFakt",), out=tmp_path / "out"))
    limits: dict[str, dict[str, Any]] = {
        "--max-tokens: 0 is less than 1": {"max_tokens": 0},
        "--max-documents: 0 is less than 1": {"max_documents": 0},
        "--max-think-tokens: -1 is below 0": {"max_think_tokens": -1, "mode": "reason"},
    }
    for message, limit in limits.items():
        with pytest.raises(UserError, match=message):
            run_mteb(MtebSettings(model=str(export), tasks=("NFCorpus",), out=tmp_path / "out", **limit))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file: is a file; name a folder"):
        run_mteb(MtebSettings(model=str(export), data=(words,), out=tmp_path / "file"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_a_hub_that_does_not_answer_may_answer_tomorrow(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(mteb, "evaluate", refuse)
    with pytest.raises(TransientError, match=r"--tasks: NFCorpus: .*cannot be reached \(nobody answers\)"):
        run_mteb(MtebSettings(model=str(export), tasks=("NFCorpus",), out=tmp_path))


def test_a_damaged_result_is_computed_again(
    export: Path, words: Path, tmp_path: Path, evaluations: list[list[str]]
) -> None:
    settings = MtebSettings(model=str(export), data=(words,), out=tmp_path)
    first = run_mteb(settings)
    (result,) = (file for file in tmp_path.rglob("*.json") if file.name != "model_meta.json")
    for damaged in ('{"broken', "{}", "[]"):
        result.write_text(damaged)
        assert run_mteb(settings)[0].scores["ndcg_at_10"] == first[0].scores["ndcg_at_10"]
        assert result.with_name(f"{result.name}.damaged").read_text() == damaged
    assert len(evaluations) == 8
