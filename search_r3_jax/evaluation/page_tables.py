"""Tables of the report: settings and outcome of runs, their index, results of `eval` and `budget`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3_jax.evaluation.controls import CONTROLS
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import ROWS, SAMPLES, interval_text, title_of
from search_r3_jax.evaluation.result_files import DataKey, EvalResult
from search_r3_jax.evaluation.run_files import RunFiles
from search_r3_jax.evaluation.significance import bootstrap_interval

# Of the bootstrap behind an interval.
SEED = 0
INTERVALS_NOTE = "In small: 95 % bootstrap intervals over the queries."
COSTS_NOTE = "Tokens and milliseconds are of a query, compiling left out."
# What `index_stall_share` counts.
BLOCKED_NOTE = (
    "“Time blocked by the index”: the seconds in which training waited for an index version or opened one, "
    "as a share of all seconds since its last start. Encoding and building take place in the indexer's own "
    "process; documents that a step re-encodes are part of the step."
)
Show = Callable[[RunFiles], str]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value, and in small print its interval or unit."""

    text: str
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; each row begins with its heading, `head` names all columns; `texts` are left-aligned."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    texts: bool = False


def run_table(stage: str, runs: Sequence[RunFiles]) -> Table:
    """Settings and outcome of runs of one stage, one column per run."""
    rows: list[tuple[str, Show]] = [*_SETTINGS, *_STAGE_SETTINGS[stage], *_OUTCOME, *_STAGE_OUTCOME[stage]]
    return _columns(
        "Settings and outcome",
        rows,
        runs,
        note="“last quarter” is the mean over the last quarter of the steps taken.",
    )


def index_table(runs: Sequence[RunFiles]) -> Table:
    """Staleness of the index behind the rewards, for runs of stage 2, one column per run."""
    return _columns("How stale the index was", _INDEX, runs, note=BLOCKED_NOTE)


def result_tables(results: Sequence[EvalResult]) -> list[Table]:
    """Tables of evaluation results.

    First an overview of all systems on all sets, if there are several sets; then for each set its systems
    with every metric, and the controls of reasoning.
    """
    of_set: dict[DataKey, dict[str, EvalResult]] = {}
    for result in results:
        systems = of_set.setdefault(result.searched, {})
        # Two systems of one name, such as two checkpoints, are distinguished by their files.
        systems[result.system if result.system not in systems else f"{result.system} ({result.file})"] = (
            result
        )
    tables = [_overview(of_set)] if len(of_set) > 1 else []
    for searched, systems in of_set.items():
        tables.append(_set_table(searched, systems))
        tables += [
            _controls_table(searched, name, result.controls)
            for name, result in systems.items()
            if result.controls
        ]
    return tables


def budget_table(content: Mapping[str, Any]) -> Table:
    """The numbers of a think-budget curve."""

    def row(name: str, point: Mapping[str, Any]) -> list[Cell]:
        gain = point.get("over_direct")
        over = (
            Cell(text="")
            if gain is None
            else Cell(text=f"{gain['mean']:+.4f}", small=interval_text(gain, "{:+.3f}"))
        )
        score = Cell(text=f"{point['ndcg@10']:.4f}", small=interval_text(point["ndcg@10_interval"]))
        return [Cell(text=name), score, over, *_costs(point)]

    rows = [
        row("direct", content["direct"]),
        *(row(str(point["max_think_tokens"]), point) for point in content["budgets"]),
    ]
    head = ["tokens allowed", "nDCG@10", "over direct", *_COST_NAMES]
    return Table(title=title_of(content), head=head, rows=rows, note=f"{INTERVALS_NOTE} {COSTS_NOTE}")


def _columns(title: str, rows: Iterable[tuple[str, Show]], runs: Sequence[RunFiles], note: str = "") -> Table:
    """One row for each entry that at least one run has."""
    shown = [[Cell(text=name), *(Cell(text=show(run)) for run in runs)] for name, show in rows]
    filled_rows = [row for row in shown if any(cell.text for cell in row[1:])]
    return Table(title=title, head=["", *(run.name for run in runs)], rows=filled_rows, note=note, texts=True)


def _overview(of_set: Mapping[DataKey, Mapping[str, EvalResult]]) -> Table:
    names = list(dict.fromkeys(name for systems in of_set.values() for name in systems))
    rows = []
    for name in names:
        results = [systems.get(name) for systems in of_set.values()]
        rows.append(
            [
                Cell(text=name),
                *(Cell(text="") if each is None else _scored(each.values("ndcg@10")) for each in results),
            ]
        )
    head = ["nDCG@10", *(f"{each.name} ({each.split}), {each.documents} documents" for each in of_set)]
    return Table(title="nDCG@10 of every system on every set", head=head, rows=rows, note=INTERVALS_NOTE)


def _set_table(searched: DataKey, systems: Mapping[str, EvalResult]) -> Table:
    first = next(iter(systems.values()))
    rows = []
    for name, result in systems.items():
        cells = [_scored(result.values(metric)) for metric in METRICS]
        gain = [] if len(systems) == 1 else [_gain(result, first)]
        rows.append([Cell(text=name), cells[0], *gain, *cells[1:], *_costs(result.costs)])
    titles = {key: title for title, key, _ in ROWS}
    metrics = [titles[metric] for metric in METRICS]
    over = [] if len(systems) == 1 else ["over the first"]
    paired = "“Over the first” is the paired difference of nDCG@10 to the first row. " if over else ""
    note = f"{INTERVALS_NOTE} {paired}{COSTS_NOTE}"
    return Table(
        title=_set_title(searched),
        head=["", metrics[0], *over, *metrics[1:], *_COST_NAMES],
        rows=rows,
        note=note,
    )


def _controls_table(searched: DataKey, system: str, controls: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, values in controls.items():
        gain = values["own_minus_this"]
        difference = (
            Cell(text="")
            if name == "own"
            else Cell(text=f"{gain['mean']:+.4f}", small=interval_text(gain, "{:+.3f}"))
        )
        score = Cell(text=f"{values['ndcg@10']:.4f}", small=interval_text(values["ndcg@10_interval"]))
        rows.append(
            [
                Cell(text=CONTROLS.get(name, name)),
                score,
                difference,
                Cell(text=f"{values['reply_tokens']:.1f}"),
            ]
        )
    title = f"What its own reasoning is worth: {system}, {_set_title(searched)}"
    return Table(title=title, head=["reasoning", "nDCG@10", "own − this", "tokens"], rows=rows)


def _set_title(searched: DataKey) -> str:
    return (
        f"{len(searched.query_ids)} queries of {searched.name} ({searched.split}) over "
        f"{searched.documents} documents"
    )


def _scored(values_q: np.ndarray) -> Cell:
    interval = bootstrap_interval(values_q, samples=SAMPLES, seed=SEED)
    return Cell(text=f"{interval.mean:.4f}", small=interval_text(vars(interval)))


def _gain(result: EvalResult, first: EvalResult) -> Cell:
    if result is first:
        return Cell(text="")
    differences_q = result.values("ndcg@10", first.of_query) - first.values("ndcg@10")
    gain = bootstrap_interval(differences_q, samples=SAMPLES, seed=SEED)
    return Cell(text=f"{gain.mean:+.4f}", small=interval_text(vars(gain), "{:+.3f}"))


_COST_NAMES = ("valid", "tokens/query", "ms/query")


def _costs(values: Mapping[str, float]) -> list[Cell]:
    shapes = {title: (key, shape) for title, key, shape in ROWS}
    return [Cell(text=shape.format(values[key])) for key, shape in (shapes[name] for name in _COST_NAMES)]


def _setting(name: str) -> Show:
    """A setting by its path in the config."""

    def show(run: RunFiles) -> str:
        value: Any = run.config
        for part in name.split("."):
            value = getattr(value, part)
        return _plain(value)

    return show


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _weights(run: RunFiles) -> str:
    sft = run.config.sft
    weights = {
        "InfoNCE": sft.infonce_weight,
        "triplet": sft.triplet_weight,
        "language": sft.language_weight,
        "KL": sft.kl_weight,
    }
    return ", ".join(f"{name} {_plain(weight)}" for name, weight in weights.items())


def _sets(run: RunFiles) -> str:
    version = run.run_json.get("data_version", [])
    sets = version if isinstance(version, list) else [version]
    names = [f"{each.get('name')} ({each.get('split')})" for each in sets if isinstance(each, dict)]
    return ", ".join(names) or _plain(run.config.data.sets)


def _changes(run: RunFiles) -> str:
    """Settings that were changed when the run was resumed, with the step."""
    changes = run.run_json.get("changes")
    changes = [each for each in changes if isinstance(each, dict)] if isinstance(changes, list) else []
    return "; ".join(
        f"{each.get('field')}: {each.get('before')} → {each.get('now')} at step {each.get('step')}"
        for each in changes
    )


def _steps(run: RunFiles) -> str:
    steps = run.config.sft.steps if run.stage == "sft" else run.config.rl.steps
    return f"{len(run.metrics)} of {steps}"


def _duration(run: RunFiles) -> str:
    """Time in steps; evaluations and their compilation are not included."""
    return _time(sum(float(run.series(name)[1].sum()) for name in ("seconds", "save_seconds")))


def _evaluating(run: RunFiles) -> str:
    """Time in evaluations, without compiling; older runs did not record it."""
    return _time(float(run.series("evaluation_seconds")[1].sum()))


def _written(run: RunFiles) -> str:
    return run.written


def _time(seconds: float) -> str:
    if not seconds:
        return ""
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )


def _skipped(run: RunFiles) -> str:
    """The count survives interruptions, so the last step's is that of the run."""
    _, skipped = run.series("skipped")
    return f"{skipped[-1]:.0f}" if len(skipped) else ""


def _best(scalar: str) -> Show:
    def show(run: RunFiles) -> str:
        steps, values = run.series(scalar)
        if not len(values):
            return ""
        # Like `--step best`: the latest of equal steps.
        best = len(values) - 1 - int(np.argmax(values[::-1]))
        return f"{values[best]:.4f} at step {steps[best]:.0f}; last {values[-1]:.4f}"

    return show


def _recent(scalar: str, shape: str) -> Show:
    def show(run: RunFiles) -> str:
        value = run.recent(scalar)
        return "" if value is None else shape.format(value)

    return show


def _of_all(scalar: str, shape: str, reduce: Callable[[np.ndarray], Any]) -> Show:
    def show(run: RunFiles) -> str:
        _, values = run.series(scalar)
        return shape.format(reduce(values)) if len(values) else ""

    return show


def _swaps(run: RunFiles) -> str:
    _, versions = run.series("index_step")
    return str(int(np.count_nonzero(np.diff(versions)))) if len(versions) else ""


def _last(values: np.ndarray) -> Any:
    return values[-1]


_SETTINGS: list[tuple[str, Show]] = [
    ("starts from", _setting("model")),
    ("data", _sets),
    ("seed", _setting("seed")),
    ("LoRA rank", _setting("lora.rank")),
]
_STAGE_SETTINGS: dict[str, list[tuple[str, Show]]] = {
    "sft": [
        ("learning rate", _setting("sft.optimizer.learning_rate")),
        ("pairs a step", _setting("sft.global_batch")),
        ("temperature", _setting("sft.temperature")),
        ("weights", _weights),
        ("reasoned share", _setting("sft.reasoned_share")),
        ("reasoning", _setting("sft.reasoning")),
    ],
    "rl": [
        ("learning rate", _setting("rl.optimizer.learning_rate")),
        ("queries a step", _setting("rl.global_queries")),
        ("replies a query", _setting("rl.group_size")),
        ("variant", _setting("rl.variant")),
        ("reward", _setting("rl.reward.variant")),
        ("β", _setting("rl.beta")),
        ("InfoNCE weight", _setting("rl.infonce.weight")),
        ("thinking tokens", _setting("rl.sampler.max_think_tokens")),
        ("index scoring", _setting("index.scoring")),
        ("checkpoint every", _setting("rl.save_every")),
    ],
}
_OUTCOME: list[tuple[str, Show]] = [
    ("steps", _steps),
    ("time in steps", _duration),
    ("time in evaluations", _evaluating),
    ("last step written on", _written),
    ("skipped updates", _skipped),
    ("settings changed", _changes),
    ("dev nDCG@10, direct", _best("dev_direct_ndcg@10")),
    ("dev nDCG@10, reasoned", _best("dev_reason_ndcg@10")),
]
_STAGE_OUTCOME: dict[str, list[tuple[str, Show]]] = {
    "sft": [
        ("loss, last quarter", _recent("loss", "{:.4f}")),
        ("in-batch accuracy, last quarter", _recent("in_batch_accuracy", "{:.1%}")),
        ("tokens/s, last quarter", _recent("tokens_per_second", "{:.0f}")),
        ("MFU, last quarter", _recent("mfu", "{:.1%}")),
    ],
    "rl": [
        ("reward, last quarter", _recent("reward", "{:.4f}")),
        ("valid rate, last quarter", _recent("valid_rate", "{:.1%}")),
        ("reply length, last quarter", _recent("reply_tokens", "{:.1f} tokens")),
        ("entropy, last quarter", _recent("entropy", "{:.3f} nats a token")),
        ("groups without spread, last quarter", _recent("zero_group_share", "{:.1%}")),
    ],
}
_INDEX: list[tuple[str, Show]] = [
    ("new versions taken in", _swaps),
    ("age in steps, mean", _of_all("index_age", "{:.1f}", np.mean)),
    ("age in steps, largest", _of_all("index_age", "{:.0f}", np.max)),
    ("corpus re-encoded a step, mean", _of_all("reencoded_share", "{:.1%}", np.mean)),
    ("corpus re-encoded in all", _of_all("reencoded_total_share", "{:.0%}", _last)),
    ("index's top 10 in the exact top 10, mean", _of_all("candidate_agreement", "{:.1%}", np.mean)),
    ("drift since the last checkpoint, least cosine", _of_all("drift_cosine", "{:.3f}", np.min)),
    ("ten nearest still the same, least share", _of_all("drift_overlap", "{:.1%}", np.min)),
    ("time blocked by the index", _of_all("index_stall_share", "{:.2%}", _last)),
]
