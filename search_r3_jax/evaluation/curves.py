"""Training curves as PNG: development metrics and losses over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from search_r3_jax.console import printable
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.run_files import distinct_names
from search_r3_jax.extras import require
from search_r3_jax.files import read_json_lines
from search_r3_jax.outputs import check_outputs, write_result

MODES = {"direct": "-", "reason": "--"}
LOSSES = ("infonce", "triplet", "language", "kl")
# Of stage 2, all in [0, 1].
REWARDS = ("reward", "reward_best", "valid_rate", "zero_group_share", "repetition")
SMOOTHED_STEPS = 5


def draw_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw nDCG@10 on development queries (line: direct, dashes: reasoned) above losses or rewards.

    One column per run. Raises UserError for a folder that is no run.
    """
    check_outputs(("--out", out), inputs=runs)
    if not runs:
        raise UserError("curves: no runs; name one or more folders that sft or rl wrote")
    pyplot = open_pyplot("curves")
    names = distinct_names([run.resolve() for run in runs])
    files_of = {name: _read(run) for name, run in zip(names, runs, strict=True)}
    figure, axes = pyplot.subplots(
        2, len(files_of), figsize=(4 * len(files_of), 6), squeeze=False, sharex="col", layout="constrained"
    )
    for (run, (evaluations, metrics)), (above, below) in zip(files_of.items(), axes.T, strict=True):
        for mode, style in MODES.items():
            seen = [
                (step, sets) for step, sets in evaluations if all(mode in modes for modes in sets.values())
            ]
            points = [
                (step, np.mean([modes[mode]["ndcg@10"] for modes in sets.values()])) for step, sets in seen
            ]
            if points:
                above.plot(
                    *zip(*points, strict=True), style, color="C0", marker="o", markersize=4, label=mode
                )
        # A dollar sign in a name must not start a formula.
        above.set_title(printable(run), parse_math=False)
        above.set(ylim=(0, 1))
        of_stage_2 = any("reward" in line for line in metrics)
        for i, name in enumerate(REWARDS if of_stage_2 else LOSSES):
            values = [(line["step"] + 1, line[name]) for line in metrics if name in line]
            # A term that is left out is logged as zero throughout.
            if any(value for _, value in values):
                steps, heights = zip(*values, strict=True)
                below.plot(
                    steps, smoothed(np.array(heights)), color=f"C{i + 1}", label=name.replace("_", " ")
                )
        # KL begins at nothing.
        below.set(
            xlabel="step", **({"ylim": (0, 1.02)} if of_stage_2 else {"yscale": "log", "ylim": (1e-3, None)})
        )
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False)
    axes[0, 0].set_ylabel("nDCG@10, development queries")
    axes[1, 0].set_ylabel(f"loss or reward, mean of {SMOOTHED_STEPS} steps")
    write_result("--out", out, lambda file: figure.savefig(file, dpi=110, format="png"))
    pyplot.close(figure)


def open_pyplot(command: str) -> ModuleType:
    """`matplotlib.pyplot` with a file backend; raises UserError naming `command` if it is not installed."""
    require(command, "eval", "matplotlib")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _read(run: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[dict[str, Any]]]:
    """The evaluations of a run by step, and its metrics."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run}: no metrics.jsonl; give folders that sft or rl wrote to")
    evaluations = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((run / "eval").glob("dev_*.json"))
    ]
    return [(evaluation["step"], evaluation["results"]) for evaluation in evaluations], read_json_lines(file)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over the last `SMOOTHED_STEPS` values."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHED_STEPS, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
