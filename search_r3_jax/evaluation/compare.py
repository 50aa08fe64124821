"""Comparison of two results of `search-r3 eval` on the same data: significance, and which queries moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.result_files import read_result_file
from search_r3_jax.evaluation.significance import Interval, bootstrap_interval, sign_flip_p_value

SHOWN = 5
MODES = ("direct", "reason", "average")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mode of one result file; `queries` maps query id → text, metrics, thought."""

    name: str
    data: dict[str, Any]
    queries: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of two results; a difference is second minus first.

    Attributes:
        means: of the first and of the second, each with its 95 % bootstrap interval.
        difference: the mean difference with the interval of the paired bootstrap.
        p_value: of the paired permutation test, two-sided.
        better, worse: how many queries are better, or worse, in the second.
        moved: the ids of all queries whose value changed, the largest change first.
    """

    metric: str
    means: tuple[Interval, Interval]
    difference: Interval
    p_value: float
    better: int
    worse: int
    moved: list[str]


def read_result(name: str) -> Result:
    """A result file, or one of its modes if `:direct`, `:reason` or `:average` is appended.

    Raises UserError naming file and field.
    """
    path, mode = Path(name), None
    head, _, tail = name.rpartition(":")
    if tail in MODES and not path.is_file():
        path, mode = Path(head), tail
    content = read_result_file(path, wrote="`search-r3 eval --out`")
    if "modes" not in content:
        raise UserError(f"{path}: modes: missing, so it is no result of `search-r3 eval`; evaluate again")
    modes = content["modes"]
    if mode is None and len(modes) > 1:
        raise UserError(
            f"{path}: has the modes {' and '.join(modes)}; append one, as in {path}:{next(iter(modes))}"
        )
    mode = mode or next(iter(modes))
    if mode not in modes:
        raise UserError(f"{path}: modes: has no {mode}; it has {' and '.join(modes)}")
    return Result(name=f"{path}, {mode}", data=content["data"], queries=modes[mode]["per_query"])


def compare_results(first: Result, second: Result, metric: str, *, samples: int, seed: int) -> Comparison:
    """Run both tests over the queries; raises UserError for different data or an unknown metric."""
    if metric not in METRICS:
        raise UserError(f"--metric: {metric!r} is none of {', '.join(METRICS)}")
    if samples < 1:
        raise UserError(f"--samples: {samples} is less than 1; give a positive number")
    _check_same_data(first, second)
    ids = list(first.queries)
    values_aq, values_bq = (
        np.array([result.queries[i][metric] for i in ids], np.float64) for result in (first, second)
    )
    differences_q = values_bq - values_aq
    changed = [int(at) for at in np.argsort(-np.abs(differences_q), kind="stable") if differences_q[at] != 0]
    return Comparison(
        metric=metric,
        means=(
            bootstrap_interval(values_aq, samples=samples, seed=seed),
            bootstrap_interval(values_bq, samples=samples, seed=seed),
        ),
        difference=bootstrap_interval(differences_q, samples=samples, seed=seed),
        p_value=sign_flip_p_value(differences_q, samples=samples, seed=seed),
        better=int(np.sum(differences_q > 0)),
        worse=int(np.sum(differences_q < 0)),
        moved=[ids[at] for at in changed],
    )


def show_comparison(first: Result, second: Result, comparison: Comparison, console: Console) -> None:
    """Print the tests in one table, then the queries that moved most, with their thoughts."""
    table = Table(
        title=f"{comparison.metric} of {len(first.queries)} queries", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("", overflow="fold")
    for name in ("mean", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, interval, shape in (
        (f"A  {first.name}", comparison.means[0], "{:.4f}"),
        (f"B  {second.name}", comparison.means[1], "{:.4f}"),
        ("B − A", comparison.difference, "{:+.4f}"),
    ):
        table.add_row(
            Text(name),
            shape.format(interval.mean),
            f"{shape.format(interval.low)} … {shape.format(interval.high)}",
        )
    console.print(table)
    same = len(first.queries) - comparison.better - comparison.worse
    console.print(
        f"paired permutation test: p = {comparison.p_value:.4g}; B better on {comparison.better}, worse on "
        f"{comparison.worse},"
        f" equal on {same} queries"
    )
    for query_id in comparison.moved[:SHOWN]:
        a, b = first.queries[query_id], second.queries[query_id]
        values = f"{a[comparison.metric]:.3f} → {b[comparison.metric]:.3f}"
        console.print(Text(f"\n{values}  {query_id}: {a['text']}", style="bold"))
        if "thought" in a or "thought" in b:
            thoughts = Table("A", "B", box=SIMPLE_HEAD, expand=True)
            thoughts.add_row(*(Text(each.get("thought", "(no reasoning)").strip()) for each in (a, b)))
            console.print(thoughts)


def _check_same_data(first: Result, second: Result) -> None:
    for field, what in (
        ("split", "splits"),
        ("queries_sha256", "queries or judgements"),
        ("cut", "cuts of the corpus"),
        ("documents_sha256", "documents"),
    ):
        if first.data.get(field) != second.data.get(field):
            raise UserError(
                f"{second.name}: data.{field}: other {what} than in {first.name}; evaluate both on the same"
            )
