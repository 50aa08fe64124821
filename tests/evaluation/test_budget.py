"""`search-r3 budget`: each point of the curve is what `eval` gives at that budget, and what is drawn are
these numbers."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import search_r3_here
from helpers.tiny_models import word_collection
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from search_r3_jax.config import SamplerConfig, TextConfig
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.budget import draw_budget, run_budget
from search_r3_jax.evaluation.evaluate import QUERIES_PER_PASS, Evaluator, rows_per_pass
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import BudgetSettings, EvalSettings
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Sampler

BUDGETS = (5, 0, 2)
LIMITS: dict[str, Any] = {"max_documents": 40, "max_document_tokens": 24, "max_query_tokens": 20}
TIMES = ("queries_per_second", "milliseconds_per_query")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built data set of 60 documents and 14 queries."""
    folder = tmp_path_factory.mktemp("words") / "data"
    collection = word_collection(documents=60, queries=14, split="test")
    build_dataset({"test": collection}, folder, name="words", source={"kind": "words"})
    return folder


@pytest.fixture(scope="module")
def asked(
    tiny_folders: dict[str, Path], words: Path, tmp_path_factory: pytest.TempPathFactory
) -> BudgetSettings:
    out = tmp_path_factory.mktemp("budget")
    return BudgetSettings(
        model=str(tiny_folders["qwen3"]),
        data=words,
        out=out / "b.json",
        picture=out / "b.png",
        budgets=BUDGETS,
        samples=500,
        **LIMITS,
    )


@pytest.fixture(scope="module")
def encoded() -> list[int]:
    """How many documents were encoded, call by call."""
    return []


@pytest.fixture(scope="module")
def record(asked: BudgetSettings, encoded: list[int]) -> dict[str, Any]:
    documents = Evaluator.documents

    def counted(self: Evaluator, state: Any, collection: Any, *rest: Any) -> np.ndarray:
        encoded.append(len(collection.documents))
        return documents(self, state, collection, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "documents", counted)
        return run_budget(asked)


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_budget_is_what_eval_gives_to_the_last_digit(
    asked: BudgetSettings, record: dict[str, Any], budget: int
) -> None:
    one = run_evaluation(
        EvalSettings(model=asked.model, data=asked.data, mode="both", max_think_tokens=budget, **LIMITS)
    )
    assert one["data"] == record["data"]
    point = record["budgets"][BUDGETS.index(budget)]
    assert point["max_think_tokens"] == budget
    ours = {
        name: value
        for name, value in point.items()
        if name not in ("max_think_tokens", "ndcg@10_interval", "over_direct")
    }
    reason = {name: value for name, value in one["modes"]["reason"].items() if name != "ndcg@10_interval"}
    assert without_times(ours) == without_times(reason)
    assert set(ours) == set(reason)
    direct = {name: value for name, value in record["direct"].items() if name != "ndcg@10_interval"}
    wanted = {name: value for name, value in one["modes"]["direct"].items() if name != "ndcg@10_interval"}
    assert without_times(direct) == without_times(wanted)


def test_the_budgets_differ_and_share_one_corpus(record: dict[str, Any], encoded: list[int]) -> None:
    assert encoded == [40]
    scores = [[entry["top"][0][1] for entry in point["per_query"].values()] for point in record["budgets"]]
    for at in (1, 2):
        assert scores[0] != scores[at]
    tokens = {point["max_think_tokens"]: point["reply_tokens"] for point in record["budgets"]}
    assert tokens[0] < tokens[2] < tokens[5]
    # The closing is no part of what was thought.
    assert all(entry["thought"] == "" for entry in record["budgets"][1]["per_query"].values())
    assert record["budgets"][1]["valid_rate"] == 0.0


def test_intervals_are_those_of_the_queries(record: dict[str, Any]) -> None:
    def values_of(part: dict[str, Any]) -> np.ndarray:
        return np.array([entry["ndcg@10"] for entry in part["per_query"].values()])

    for part in (record["direct"], *record["budgets"]):
        interval = part["ndcg@10_interval"]
        assert interval == vars(bootstrap_interval(values_of(part), samples=500, seed=0))
        assert interval["mean"] == part["ndcg@10"]
        assert set(METRICS) < set(part)
    for point in record["budgets"]:
        gain = bootstrap_interval(values_of(point) - values_of(record["direct"]), samples=500, seed=0)
        assert point["over_direct"] == vars(gain)


def test_files_and_table(
    asked: BudgetSettings, record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(asked.out.read_text()) == record
    assert sorted(file.name for file in asked.out.parent.iterdir()) == ["b.json", "b.png"]
    again = run_budget(
        BudgetSettings(
            model=asked.model, data=asked.data, out=tmp_path / "b.json", budgets=(2, 0), samples=10, **LIMITS
        )
    )
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown[2:])) <= 80
    rows = {line.split()[0]: line.split() for line in shown if line.strip()}
    assert [name for name in rows if name in ("direct", "2", "0")] == ["direct", "2", "0"]
    for part, name in ((again["direct"], "direct"), (again["budgets"][0], "2"), (again["budgets"][1], "0")):
        interval = part["ndcg@10_interval"]
        assert rows[name][1:5] == [
            f"{part['ndcg@10']:.4f}",
            f"{interval['low']:.3f}",
            "…",
            f"{interval['high']:.3f}",
        ]
        assert rows[name][-3:] == [
            f"{part['valid_rate']:.0%}",
            f"{part['reply_tokens']:.1f}",
            f"{part['milliseconds_per_query']:.1f}",
        ]
    assert [file.name for file in tmp_path.iterdir()] == ["b.json"]


def test_the_picture_shows_the_numbers(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kept open, so that what was drawn can be read.
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    draw_budget(record, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    axis: Axes = pyplot.gcf().axes[0]
    points = sorted(record["budgets"], key=lambda point: point["reply_tokens"])
    (bars,) = [container for container in axis.containers if isinstance(container, ErrorbarContainer)]
    line, _, (segments,) = bars.lines
    assert line is not None
    np.testing.assert_allclose(
        np.asarray(line.get_xydata()), [(point["reply_tokens"], point["ndcg@10"]) for point in points]
    )
    for drawn, point in zip(segments.get_segments(), points, strict=True):
        ends = [point["ndcg@10_interval"][end] for end in ("low", "high")]
        np.testing.assert_allclose(drawn, [(point["reply_tokens"], end) for end in ends])
    level = next(each for each in axis.get_lines() if str(each.get_label()).startswith("direct"))
    np.testing.assert_allclose(np.asarray(level.get_ydata()), record["direct"]["ndcg@10"])


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [Sampler, Encoder])
def test_compiling_is_left_out_of_the_milliseconds(
    tiny_model, compiler: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flax import nnx

    from search_r3_jax.text.prompts import Prompter

    real = compiler.compile

    def slow(*arguments: Any, **settings: Any) -> None:
        real(*arguments, **settings)
        time.sleep(5)

    monkeypatch.setattr(compiler, "compile", slow)
    graph, state = nnx.split(tiny_model.decoder)
    collection = word_collection(documents=20, queries=10, split="test")
    evaluator = Evaluator(
        graph, Prompter(tiny_model.tokenizer), TextConfig(), SamplerConfig(max_think_tokens=2)
    )
    vectors = evaluator.documents(state, collection)
    evaluate = evaluator.reason if compiler is Sampler else evaluator.direct
    result = evaluate(state, collection, vectors)
    assert 10 / result.queries_per_second > 5
    assert 0 < 10 * result.milliseconds_per_query < 5000


@pytest.mark.parametrize("queries", [1, 7, 8, 9, 127, 128, 129, 256, 300, 1000])
def test_passes_are_about_full(queries: int) -> None:
    width, passes = rows_per_pass(queries), -(-queries // QUERIES_PER_PASS)
    assert width % 8 == 0
    assert 8 <= width <= QUERIES_PER_PASS
    assert -(-queries // width) == passes
    assert passes * width - queries < 8 * passes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"budgets": (8, -1)}, "--budgets: -1 is below 0"),
        ({"budgets": (8, 0, 8)}, "--budgets: 8 is there twice"),
        ({"budgets": ()}, "--budgets: none given"),
        ({"out": Path("nowhere/b.json")}, "--out: nowhere: no such folder"),
        ({"picture": Path("nowhere/b.png")}, "--picture: nowhere: no such folder"),
        ({"picture": Path("b.json"), "out": Path("b.json")}, "--picture: b.json: is --out too"),
        ({"model": "bm25"}, "--model: bm25 writes no reasoning"),
        ({"samples": 0}, "--samples: 0"),
        ({"max_documents": 0}, "--max-documents: 0"),
        ({"max_query_tokens": 0}, "--max-query-tokens: 0"),
        ({"split": "dev"}, "dev"),
        ({"data": Path("nowhere")}, "nowhere"),
    ],
)
def test_mistakes_are_one_line_before_any_model_is_loaded(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], named: str
) -> None:
    def loaded(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("search_r3_jax.evaluation.systems.load_for_inference", loaded)
    with pytest.raises(UserError) as caught:
        run_budget(BudgetSettings(**({"model": "m", "data": words, "out": tmp_path / "b.json"} | given)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_beyond_the_models_positions_is_named(
    tiny_folders: dict[str, Path], words: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="512 leave no room for a query beside 500 tokens of thinking"):
        run_budget(
            BudgetSettings(
                model=str(tiny_folders["llama"]), data=words, out=tmp_path / "b.json", budgets=(0, 500)
            )
        )


def test_the_command_line(words: Path, tmp_path: Path) -> None:
    flags = ("--model", "nowhere", "--data", str(words), "--out", str(tmp_path / "b"))
    shown = search_r3_here("budget", *flags, "--budgets", "4", "-1")
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "--budgets: -1 is below 0" in shown.stderr


def test_labels_of_points_close_together_are_one(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    # The model stops by itself: larger budgets are written no further.
    budgets = []
    for allowed, tokens, milliseconds in ((0, 5.0, 20), (8, 12.0, 31), (16, 12.1, 32), (64, 12.3, 30)):
        point = dict(record["budgets"][0])
        point |= {"max_think_tokens": allowed, "reply_tokens": tokens, "milliseconds_per_query": milliseconds}
        budgets.append(point)
    draw_budget(record | {"budgets": budgets}, tmp_path / "b.png")
    assert [text.get_text() for text in pyplot.gcf().axes[0].texts] == ["0\n20 ms", "8–64\n30–32 ms"]
