"""Pictures of the report: a panel per logged scalar with all runs of a stage, and the think-budget curve."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from search_r3_jax.console import printable
from search_r3_jax.evaluation.budget import budget_figure
from search_r3_jax.evaluation.curves import SMOOTHED_STEPS, open_pyplot, smoothed
from search_r3_jax.evaluation.report import title_of
from search_r3_jax.evaluation.run_files import RunFiles

# The width of a phone, so that text is not shrunk.
WIDTH, HEIGHT = 4.2, 2.6
STYLES = ("-", "--", ":")
# The first value is left out of the vertical axis where it would make it more than this many times as long.
FLATTENED = 2.0
MARGIN = 0.08
# First values that a label names.
MOST_NAMED = 4
# Longer series are drawn as this many means: a picture of this size cannot show more.
MOST_POINTS = 400
RC = {
    # A dollar sign in the name of a folder or model must not start a formula.
    "text.parse_math": False,
    # The same numbers give the same page.
    "svg.hashsalt": "search-r3",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.formatter.useoffset": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Content of one picture.

    Attributes:
        terms: scalar of `metrics.jsonl` → what the legend calls it where there are several.
        measured: not at every step: drawn as points, not as a smoothed line.
        weighted: a term of the loss; left out if it is zero throughout, as with weight 0.
        limits: limits of the vertical axis; None means that the values decide.
    """

    name: str
    title: str
    terms: Mapping[str, str] = field(default_factory=dict)
    measured: bool = False
    weighted: bool = False
    limits: tuple[float, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in both formats; `name` is that of its file, `alt_text` describes it."""

    name: str
    alt_text: str
    svg: bytes
    png: bytes


def _panel(scalar: str, title: str, limits: tuple[float, float | None] | None = None) -> Panel:
    return Panel(name=scalar, title=title, terms={scalar: ""}, limits=limits)


def _loss_term(scalar: str, title: str) -> Panel:
    return Panel(name=scalar, title=title, terms={scalar: ""}, weighted=True)


SHARE = (-0.02, 1.02)
FROM_ZERO = (0.0, None)
DEVELOPMENT = (
    Panel(
        name="dev-ndcg",
        title="nDCG@10, development queries",
        terms={"dev_direct_ndcg@10": "direct", "dev_reason_ndcg@10": "reasoned"},
        measured=True,
    ),
    Panel(
        name="dev-valid",
        title="valid rate, development queries",
        terms={"dev_reason_valid_rate": ""},
        measured=True,
        limits=SHARE,
    ),
)
PANELS = {
    "sft": (
        _panel("loss", "loss"),
        _loss_term("infonce", "InfoNCE"),
        _loss_term("triplet", "triplet margin loss"),
        _loss_term("language", "cross-entropy of the reply"),
        _loss_term("kl", "KL to the base, nats a token"),
        _panel("in_batch_accuracy", "in-batch accuracy", SHARE),
        _panel("gradient_norm", "gradient norm"),
        *DEVELOPMENT,
    ),
    "rl": (
        Panel(name="reward", title="reward", terms={"reward": "mean", "reward_best": "best of a group"}),
        _panel("reward_within_group_std", "spread of the reward within groups"),
        _panel("zero_group_share", "share of groups without any spread", SHARE),
        _panel("valid_rate", "valid rate", SHARE),
        _panel("reply_tokens", "reply length, tokens"),
        _panel("entropy", "entropy, nats a token"),
        _panel("repetition", "repetition"),
        _panel("effective_rank", "effective rank of the embeddings"),
        _loss_term("kl", "KL to the reference, nats a token"),
        _panel("policy", "policy loss"),
        _loss_term("infonce", "InfoNCE"),
        _panel("gradient_norm", "gradient norm"),
        *DEVELOPMENT,
        Panel(
            name="dev-swap-gain",
            title="nDCG@10 lost with another's reasoning",
            terms={"dev_swap_gain": ""},
            measured=True,
        ),
    ),
}
INDEX_PANELS = (
    _panel("index_age", "index age, steps", FROM_ZERO),
    _panel("reencoded_share", "share of the corpus re-encoded in a step", FROM_ZERO),
    _panel("candidate_agreement", "index's top 10 in the exact top 10", SHARE),
    Panel(
        name="drift",
        title="drift since the last checkpoint",
        terms={"drift_cosine": "cosine", "drift_overlap": "same neighbours"},
        measured=True,
    ),
    _panel("index_stall_share", "share of the time blocked by the index", FROM_ZERO),
)


def draw_panels(stage: str, runs: Sequence[RunFiles], panels: Sequence[Panel]) -> list[Picture]:
    """A picture of each panel for which a run has values."""
    pyplot = open_pyplot("report")
    pictures = []
    for panel in panels:
        lines = [
            (at, term, *run.series(scalar))
            for at, run in enumerate(runs)
            for term, scalar in enumerate(panel.terms)
        ]
        lines = [
            (at, term, steps, values)
            for at, term, steps, values in lines
            if (values.any() if panel.weighted else len(values))
        ]
        if lines:
            with pyplot.rc_context(RC):
                figure = _figure(pyplot, panel, [run.name for run in runs], lines)
                alt_text = f"{panel.title}: " + "; ".join(
                    _line_summary(runs[at].name, panel, term, values) for at, term, _, values in lines
                )
                pictures.append(_picture(pyplot, f"{stage}-{panel.name.replace('_', '-')}", alt_text, figure))
    return pictures


def draw_budget_curve(name: str, content: Mapping[str, Any]) -> Picture:
    """The think-budget curve of a result of `budget`."""
    pyplot = open_pyplot("report")
    with pyplot.rc_context(RC):
        figure = budget_figure(pyplot, content, size=(WIDTH * 1.1, HEIGHT * 1.3))
        return _picture(
            pyplot, name, f"nDCG@10 over the tokens written for a query. {title_of(content)}", figure
        )


def _figure(
    pyplot: ModuleType,
    panel: Panel,
    names: Sequence[str],
    lines: Sequence[tuple[int, int, np.ndarray, np.ndarray]],
) -> Any:
    """One colour per run, one line style per term."""
    figure, axis = pyplot.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    if not panel.measured:
        lines = [(at, term, _downsampled(steps), _downsampled(values)) for at, term, steps, values in lines]
    limits = None if panel.limits is not None else _limits_of_later(lines)
    for at, term, steps, values in lines:
        look = {"color": f"C{at % 10}", "linestyle": STYLES[term], "linewidth": 1.5}
        if limits is not None and not limits[0] <= values[0] <= limits[1]:
            steps, values = steps[1:], values[1:]
        if panel.measured:
            axis.plot(steps, values, **look, marker="o", markersize=3.5)
        else:
            axis.plot(steps, values, **look | {"linewidth": 0.8, "alpha": 0.3})
            # A single step makes no line.
            axis.plot(
                steps, smoothed(values), **look, marker="o" if len(values) == 1 else None, markersize=3.5
            )
    axis.set(title=panel.title, xlabel="steps")
    if panel.limits is not None:
        bottom, top = panel.limits
        # Over the largest value, which may be 0 throughout.
        axis.set_ylim(bottom, 1.08 * max(values.max() for *_, values in lines) or 1.0 if top is None else top)
    elif limits is not None:
        _mark_firsts(axis, limits, lines)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    handles, labels = _legend(pyplot, panel, names, lines)
    if labels:
        # As many columns as fit without shrinking the axes.
        columns = max(1, min(4, 48 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _limits_of_later(
    lines: Sequence[tuple[int, int, np.ndarray, np.ndarray]],
) -> tuple[float, float] | None:
    """Limits of the vertical axis for all but the first values, where these would flatten the others."""
    later = np.concatenate([values[1:] for *_, values in lines])
    # Of fewer there is no shape to be seen.
    if len(later) < 3:
        return None
    low, high = float(later.min()), float(later.max())
    firsts = [float(values[0]) for *_, values in lines]
    whole = max(high, *firsts) - min(low, *firsts)
    if high == low or whole <= FLATTENED * (high - low):
        return None
    return low - MARGIN * (high - low), high + MARGIN * (high - low)


def _mark_firsts(
    axis: Any,
    limits: tuple[float, float],
    lines: Sequence[tuple[int, int, np.ndarray, np.ndarray]],
) -> None:
    """Set the limits, and mark the first values that lie outside at the edge."""
    bottom, top = limits
    axis.set_ylim(bottom, top)
    firsts = [(at, steps[0], float(values[0])) for at, _, steps, values in lines]
    outside = [(at, step, value) for at, step, value in firsts if not bottom <= value <= top]
    for at, step, value in outside:
        edge, marker = (top, "^") if value > top else (bottom, "v")
        axis.plot(
            step, edge, marker=marker, color=f"C{at % 10}", markersize=6, linestyle="none", clip_on=False
        )
    # One label, so that those of several runs are not printed over each other.
    named = ", ".join(f"{value:.3g}" for *_, value in outside[:MOST_NAMED])
    more = ", …" if len(outside) > MOST_NAMED else ""
    text = f"first: {named}{more}"
    where, align = ((10, -2), "top") if outside[0][2] > top else ((10, 4), "bottom")
    edge = top if outside[0][2] > top else bottom
    axis.annotate(
        text,
        (outside[0][1], edge),
        xytext=where,
        textcoords="offset points",
        va=align,
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
    )


def _legend(
    pyplot: ModuleType,
    panel: Panel,
    names: Sequence[str],
    lines: Sequence[tuple[int, int, np.ndarray, np.ndarray]],
) -> tuple[list[Any], list[str]]:
    """Runs by colour where there are several, then terms by style where there are several."""
    runs = sorted({at for at, *_ in lines})
    terms = sorted({term for _, term, *_ in lines})
    term_names = list(panel.terms.values())
    handles, labels = [], []
    if len(names) > 1:
        handles += [pyplot.Line2D([], [], color=f"C{at % 10}") for at in runs]
        labels += [_short(names[at]) for at in runs]
    if len(terms) > 1 or term_names[terms[0]]:
        color = "C0" if len(names) == 1 else "0.4"
        handles += [pyplot.Line2D([], [], color=color, linestyle=STYLES[term]) for term in terms]
        labels += [term_names[term] for term in terms]
    return handles, labels


def _short(name: str, most: int = 28) -> str:
    """A name that fits; the end is kept because it distinguishes runs."""
    name = printable(name)
    return name if len(name) <= most else "…" + name[1 - most :]


def _downsampled(values: np.ndarray) -> np.ndarray:
    """Means of at most `MOST_POINTS` equal stretches."""
    return np.array([part.mean() for part in np.array_split(values, min(len(values), MOST_POINTS))])


def _line_summary(run: str, panel: Panel, term: int, values: np.ndarray) -> str:
    """First and last value of a line; means of several steps for scalars logged at every step."""
    name = list(panel.terms.values())[term]
    few = 1 if panel.measured else SMOOTHED_STEPS
    of = f"{run}, {name}" if name else run
    return f"{of}: from {values[:few].mean():.4g} to {values[-few:].mean():.4g}"


def _picture(pyplot: ModuleType, name: str, alt_text: str, figure: Any) -> Picture:
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    pyplot.close(figure)
    return Picture(name=name, alt_text=alt_text, svg=svg.getvalue(), png=png.getvalue())
