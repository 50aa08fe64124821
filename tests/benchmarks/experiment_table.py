"""The tables of the recorded experiment, as Markdown: `python tests/benchmarks/experiment_table.py`.

Reads what `experiment.py record` wrote. With several seeds of stage 2 a query's value is its mean over them:
an interval is one over queries; what each seed gave alone stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from experiment import AIMED_AT, RECORDS

from search_r3_jax.evaluation.report import SAMPLES
from search_r3_jax.evaluation.significance import bootstrap_interval, sign_flip_p_value

SETS = ("cosqa", "medquad", "conala", "mbpp", "entailmentbank", "strategyqa", "scifact", "squad_sent")
BASELINES = (
    ("bm25", "BM25"),
    ("bm25-split", "BM25, identifiers split"),
    ("minilm", "all-MiniLM-L6-v2"),
    ("untrained", "untrained"),
)
OURS = (
    (("sft", "direct"), "stage 1"),
    (("sft", "reason"), "stage 1, reasoned"),
    (("sft", "average"), "stage 1, mean of both"),
    (("rl", "direct"), "stage 2"),
    (("rl", "reason"), "stage 2, reasoned"),
    (("rl", "average"), "stage 2, mean of both"),
)
CONTROLS = (
    ("empty", "no reasoning"),
    ("repeated", "query repeated"),
    ("random", "random words"),
    ("swapped", "another query's reasoning"),
)
# The results of each system on each collection; of stage 2 a system a seed.
Results = dict[str, dict[str, Any]]


def main() -> None:
    results: Results = {
        file.stem: json.loads(file.read_text())["results"] for file in sorted(RECORDS.glob("*.json"))
    }
    print("\n".join([*all_systems(results), "", *stage_2_over_stage_1(results), "", *swap_probe(results)]))


def values_of(text: str) -> np.ndarray:
    """nDCG@10 of each query [Q], in the order of their ids."""
    return np.array(text.split(), np.float64)


def measured(results: Results, name: str, stage: str, mode: str, control: str = "") -> np.ndarray:
    """nDCG@10 [S,Q] of one collection in one mode of a stage, or with a control's reasoning, in all seeds
    that were measured."""
    rows = []
    for system, found_in in results.items():
        found = (
            found_in.get(name, {}).get("modes", {}).get(mode) if system.split("_seed")[0] == stage else None
        )
        if found is not None and (not control or "controls" in found):
            rows.append(values_of((found["controls"][control] if control else found)["of_query"]))
    return np.array(rows)


def cell(values_q: np.ndarray) -> str:
    """A mean and its 95 % interval."""
    interval = bootstrap_interval(values_q, samples=SAMPLES, seed=0)
    return f"{interval.mean:.3f} ({interval.low:.3f} … {interval.high:.3f})"


def row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def heading(*names: str) -> list[str]:
    return [row("", names), "|---" * (len(names) + 1) + "|"]


def all_systems(results: Results) -> list[str]:
    """Every system on every collection; a mean over as many seeds as were measured there."""
    lines = heading(*SETS)
    wanted = [(system, "direct", "", label) for system, label in BASELINES]
    wanted += [(stage, mode, "", label) for (stage, mode), label in OURS]
    wanted += [("rl", "reason", control, f"… with {label}") for control, label in CONTROLS]
    for stage, mode, control, label in wanted:
        found = [measured(results, name, stage, mode, control) for name in SETS]
        lines.append(row(label, [cell(each.mean(axis=0)) if len(each) else "" for each in found]))
    return lines


def stage_2_over_stage_1(results: Results) -> list[str]:
    """What stage 2, reasoned and direct, has over stage 1's direct embedding, query by query."""
    lines = heading(
        "stage 2, reasoned − stage 1",
        "p",
        "each seed",
        "stage 2, direct − stage 1",
        "stage 2, reasoned − direct",
    )
    for name in AIMED_AT:
        reasoned, direct, before = (
            measured(results, name, *which)
            for which in (("rl", "reason"), ("rl", "direct"), ("sft", "direct"))
        )
        if not len(reasoned) or not len(before):
            continue
        gains = reasoned - before
        p = sign_flip_p_value(gains.mean(axis=0), samples=SAMPLES, seed=0)
        each = ", ".join(f"{value:+.3f}" for value in gains.mean(axis=1))
        lines.append(
            row(
                name,
                [
                    difference(gains),
                    f"{p:.4f}",
                    each,
                    difference(direct - before),
                    difference(reasoned - direct),
                ],
            )
        )
    return lines


def difference(gains_sq: np.ndarray) -> str:
    interval = bootstrap_interval(gains_sq.mean(axis=0), samples=SAMPLES, seed=0)
    return f"{interval.mean:+.3f} ({interval.low:+.3f} … {interval.high:+.3f})"


def swap_probe(results: Results) -> list[str]:
    """What another query's reasoning costs, and none, beside the gain over stage 1's direct embedding."""
    lines = heading("gain over stage 1", "exchanged costs", "share of the gain", "leaving it out costs")
    for name in AIMED_AT:
        own, swapped, empty = (
            measured(results, name, "rl", "reason", control) for control in ("own", "swapped", "empty")
        )
        before = measured(results, name, "sft", "direct")
        if not len(own) or not len(before):
            continue
        gain, cost = (own - before).mean(), (own - swapped).mean()
        share = f"{cost / gain:.0%}" if gain > 0 else "no gain"
        lines.append(
            row(name, [difference(own - before), difference(own - swapped), share, difference(own - empty)])
        )
    return lines


if __name__ == "__main__":
    main()
