"""Comparing two results: the numbers of the tests, what is shown, and what is refused."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.compare import compare_results, read_result, show_comparison
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import FORMAT_VERSION


def record(values: list[float], thoughts: list[str] | None = None, mode: str = "direct") -> dict[str, Any]:
    queries = {
        f"q{i}": {"text": f"query {i} [bold]x", **dict.fromkeys(METRICS, value)}
        for i, value in enumerate(values)
    }
    for entry, thought in zip(queries.values(), thoughts or (), strict=False):
        entry["thought"] = thought
    cut = {"asked": 5, "ids_sha256": "c"}
    data = {
        "split": "test",
        "documents_sha256": "d",
        "queries_sha256": "q",
        "cut": cut,
        "path": "anywhere",
        "name": "n",
    }
    return {"format_version": FORMAT_VERSION, "data": data, "modes": {mode: {"per_query": queries}}}


def write(folder: Path, name: str, content: Any) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_numbers_and_the_queries_that_moved(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(size=50)
    after = before + generator.normal(0.05, 0.1, 50)
    after[:5] = before[:5]
    after[7], after[9] = before[7] + 0.9, before[9] - 0.8
    first = read_result(write(tmp_path, "a.json", record(before.tolist())))
    # Queries in another order are still paired by their ids.
    other = record(after.tolist(), thoughts=[f"thought {i} <b>" for i in range(50)], mode="reason")
    per_query = other["modes"]["reason"]["per_query"]
    other["modes"]["reason"]["per_query"] = dict(reversed(per_query.items()))
    second = read_result(write(tmp_path, "b.json", other))
    found = compare_results(first, second, "map", samples=5000, seed=0)
    assert found.difference.mean == pytest.approx(float(np.mean(after - before)))
    assert (found.means[0].mean, found.means[1].mean) == pytest.approx((before.mean(), after.mean()))
    assert found.difference.low < found.difference.mean < found.difference.high
    # The paired interval is the narrower one: most of the variance is between queries.
    assert found.difference.high - found.difference.low < 0.8 * (found.means[0].high - found.means[0].low)
    assert 0 < found.p_value < 1
    assert found.better + found.worse == 45
    assert found.moved[:2] == ["q7", "q9"]
    assert len(found.moved) == 45
    shown = io.StringIO()
    show_comparison(first, second, found, Console(file=shown, width=80, highlight=False))
    text = shown.getvalue()
    for expected in (
        "thought 7 <b>",
        "(no reasoning)",
        "query 7 [bold]x",
        f"{before[9]:.3f} → {after[9]:.3f}  q9",
        "B better on",
    ):
        assert expected in text


def test_one_file_may_hold_both_modes(tmp_path: Path) -> None:
    both = record([0.1, 0.2])
    both["modes"]["reason"] = record([0.3, 0.2], mode="reason")["modes"]["reason"]
    file = write(tmp_path, "a.json", both)
    found = compare_results(
        read_result(f"{file}:direct"), read_result(f"{file}:reason"), "mrr", samples=100, seed=0
    )
    assert found.difference.mean == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"has the modes direct and reason; append one"):
        read_result(file)
    with pytest.raises(UserError, match="has no reason; it has direct"):
        read_result(write(tmp_path, "b.json", record([0.1])) + ":reason")


@pytest.mark.parametrize("field", ["split", "documents_sha256", "queries_sha256", "cut"])
def test_results_of_other_data_are_refused(tmp_path: Path, field: str) -> None:
    first = record([0.1, 0.2])
    second = copy.deepcopy(first)
    second["data"]["path"] = "elsewhere"
    a = read_result(write(tmp_path, "a.json", first))
    compare_results(a, read_result(write(tmp_path, "b.json", second)), "mrr", samples=10, seed=0)
    second["data"][field] = None
    b = read_result(write(tmp_path, "c.json", second))
    with pytest.raises(
        UserError, match=rf"c\.json, direct: data\.{field}: other .* evaluate both on the same"
    ):
        compare_results(a, b, "mrr", samples=10, seed=0)


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    result = read_result(write(tmp_path, "a.json", record([0.1])))
    with pytest.raises(UserError, match="--metric: 'bleu' is none of ndcg@10"):
        compare_results(result, result, "bleu", samples=10, seed=0)
    with pytest.raises(UserError, match="--samples: 0"):
        compare_results(result, result, "map", samples=0, seed=0)
    for content in ({"step": 1}, [], {"format_version": 99}, {"format_version": FORMAT_VERSION}):
        with pytest.raises(UserError, match="format_version: is no result"):
            read_result(write(tmp_path, "b.json", content))
    with pytest.raises(UserError, match="cannot be read"):
        read_result(str(tmp_path / "nowhere.json"))
