"""Think-budget curve: quality and cost of reasoning at each budget of thinking tokens."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from search_r3_jax.console import TextConsole, printable
from search_r3_jax.data.collection import Collection
from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.curves import open_pyplot
from search_r3_jax.evaluation.evaluate import ModeResult
from search_r3_jax.evaluation.report import (
    check_limits,
    common_content,
    interval_text,
    open_collection,
    per_query,
    query_values,
    title_of,
)
from search_r3_jax.evaluation.settings import BudgetSettings
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.evaluation.systems import BudgetResult, DecoderSystem, is_baseline
from search_r3_jax.hub.model_names import check_model_name
from search_r3_jax.outputs import (
    check_outputs,
    message_stream,
    write_all,
    write_json_result,
    write_result,
)

# Of a point, as a share of the width of the picture.
LABEL_WIDTH = 0.14
# Heading and how a value is written; 80 columns hold them all.
COLUMNS = (
    ("R@10", "recall@10", "{:.3f}"),
    ("R@100", "recall@100", "{:.3f}"),
    ("MRR", "mrr", "{:.3f}"),
    ("MAP", "map", "{:.3f}"),
    ("valid", "valid_rate", "{:.0%}"),
    ("tokens", "reply_tokens", "{:.1f}"),
    ("ms", "milliseconds_per_query", "{:.1f}"),
)


def run_budget(settings: BudgetSettings) -> dict[str, Any]:
    """Evaluate each budget, print the table, write JSON and picture; return the JSON content.

    Of several processes all compute, and process 0 prints and writes. Raises UserError before any model is
    loaded.
    """
    _check(settings)
    notes = TextConsole(sys.stderr, quiet=not is_first())
    collection, subset = open_collection(settings, notes)
    system = DecoderSystem(settings.evaluation())
    result = system.evaluate_budgets(collection, settings.budgets, notes)
    identity = dict(system.identity()) | {"max_think_tokens": list(settings.budgets)}
    content = common_content(settings, identity, collection, subset, result.document_seconds) | _curve(
        settings, collection, result
    )
    if not is_first():
        return content
    writes = [partial(write_json_result, "--out", settings.out, content)]
    if settings.picture is not None:
        writes.append(partial(draw_budget, content, settings.picture))
    try:
        # Before the table: a result must not be lost with the reader of standard output.
        write_all(*writes)
    finally:
        _show(content, message_stream(settings.out, settings.picture))
    return content


def draw_budget(content: Mapping[str, Any], out: Path) -> None:
    """Draw nDCG@10 with its intervals over the tokens per query, and direct search as a level line, as PNG.

    `content` is that of `run_budget`.
    """
    pyplot = open_pyplot("budget")
    figure = budget_figure(pyplot, content, size=(6, 4))
    # A dollar sign in a name must not start a formula.
    figure.axes[0].set_title(printable(title_of(content)), fontsize=9, parse_math=False)
    write_result("--picture", out, lambda file: figure.savefig(file, dpi=110, format="png"))
    pyplot.close(figure)


def budget_figure(pyplot: ModuleType, content: Mapping[str, Any], *, size: tuple[float, float]) -> Any:
    """The figure of `draw_budget`, `size` in inches, without a title."""
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    points = sorted(content["budgets"], key=lambda point: point["reply_tokens"])
    tokens = np.array([point["reply_tokens"] for point in points])
    means = np.array([point["ndcg@10"] for point in points])
    ends = np.array([[point["ndcg@10_interval"][end] for point in points] for end in ("low", "high")])
    label = "reasoned; below: thinking tokens allowed, ms a query"
    axis.errorbar(
        tokens, means, yerr=np.abs(ends - means), color="C0", marker="o", markersize=4, capsize=3, label=label
    )
    for crowd in _crowds(points):
        # Under the bars, where no line passes.
        under = (
            float(np.mean([point["reply_tokens"] for point in crowd])),
            min(point["ndcg@10_interval"]["low"] for point in crowd),
        )
        axis.annotate(
            _price(crowd),
            under,
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    direct, interval = content["direct"], content["direct"]["ndcg@10_interval"]
    axis.axhline(
        direct["ndcg@10"],
        color="C1",
        linestyle="--",
        label=f"direct, {direct['milliseconds_per_query']:.0f} ms a query",
    )
    axis.axhspan(interval["low"], interval["high"], color="C1", alpha=0.15, linewidth=0)
    axis.set(xlabel="tokens written for a query", ylabel="nDCG@10, 95 % interval")
    axis.margins(x=0.08, y=0.2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    # Outside, where it covers neither lines nor labels.
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    return figure


def _crowds(points: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The points, sorted by their tokens, in groups whose labels would be printed over each other."""
    tokens = [point["reply_tokens"] for point in points]
    apart = LABEL_WIDTH * (tokens[-1] - tokens[0])
    crowds = [[points[0]]]
    for before, point in itertools.pairwise(points):
        if point["reply_tokens"] - before["reply_tokens"] >= max(apart, 1e-9):
            crowds.append([])
        crowds[-1].append(point)
    return crowds


def _price(crowd: Sequence[Mapping[str, Any]]) -> str:
    """Thinking tokens allowed, and milliseconds a query: a number, or the least and the most."""

    def ends(name: str) -> str:
        values = sorted({f"{point[name]:.0f}" for point in crowd}, key=int)
        return "–".join(values if len(values) < 2 else (values[0], values[-1]))

    return f"{ends('max_think_tokens')}\n{ends('milliseconds_per_query')} ms"


def _check(settings: BudgetSettings) -> None:
    check_outputs(
        ("--out", settings.out), ("--picture", settings.picture), inputs=[settings.model, settings.data]
    )
    if not settings.budgets:
        raise UserError("--budgets: none given; name at least one number of tokens")
    for at, budget in enumerate(settings.budgets):
        if budget < 0:
            raise UserError(f"--budgets: {budget} is below 0; 0 forces the embed token at once")
        if budget in settings.budgets[:at]:
            raise UserError(f"--budgets: {budget} is there twice; name each once")
    if settings.samples < 1:
        raise UserError(f"--samples: {settings.samples} is less than 1; give a positive number")
    check_limits(settings)
    if is_baseline(settings.model):
        raise UserError(f"--model: {settings.model} writes no reasoning; give a model of ours")
    check_model_name(settings.model)
    if settings.picture is not None:
        open_pyplot("budget")


def _curve(settings: BudgetSettings, collection: Collection, result: BudgetResult) -> dict[str, Any]:
    def numbers(mode: ModeResult) -> dict[str, Any]:
        interval = bootstrap_interval(
            query_values(collection, mode), samples=settings.samples, seed=settings.seed
        )
        return {**mode.as_dict(), "ndcg@10_interval": dataclasses.asdict(interval)}

    direct_q = query_values(collection, result.direct)
    budgets = []
    for budget, mode in result.reasoned.items():
        gain = bootstrap_interval(
            query_values(collection, mode) - direct_q, samples=settings.samples, seed=settings.seed
        )
        point = {"max_think_tokens": budget, **numbers(mode), "over_direct": dataclasses.asdict(gain)}
        budgets.append(point | {"per_query": per_query(collection, mode)})
    return {
        "samples": settings.samples,
        "seed": settings.seed,
        "direct": numbers(result.direct) | {"per_query": per_query(collection, result.direct)},
        "budgets": budgets,
    }


def _show(content: Mapping[str, Any], stream: TextIO) -> None:
    table = Table(title=Text(title_of(content)), title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("thinking", no_wrap=True)
    for name in ("nDCG@10", "95 % interval", *(name for name, _, _ in COLUMNS)):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        ("direct", content["direct"]),
        *((str(point["max_think_tokens"]), point) for point in content["budgets"]),
    ]
    for name, values in rows:
        interval = interval_text(values["ndcg@10_interval"])
        table.add_row(
            name,
            f"{values['ndcg@10']:.4f}",
            interval,
            *(shape.format(values[key]) for _, key, shape in COLUMNS),
        )
    console = TextConsole(stream)
    console.print(table)
    console.print("thinking: tokens allowed; tokens and ms: of a query, compiling left out")
