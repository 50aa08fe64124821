"""Stage 2 of SmolLM2 on a real collection, from stage 1 on: `python tests/benchmarks/stage2.py --data FOLDER
--out FOLDER`.

StrategyQA, a BEIR folder in --data: stage 1, a quarter of its queries in the reasoned format, then stage 2 on
600 of its queries over 3,000 documents. On the development queries, which neither stage trains on, what came
out is compared with what went in, query by query; then `search-r3 budget` and `eval --controls` on the test
queries. What is there already is not done again. Writes stage2.json and stage2.png into --out, and the table
to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.evaluation.significance import bootstrap_interval

COLLECTION = "strategyqa"
SFT_STEPS, RL_STEPS = 60, 80
TEXT = ["--text.max-document-tokens", "40", "--data.dev-queries", "200", "--data.dev-documents", "1000"]
SFT = ["--sft.steps", str(SFT_STEPS), "--sft.reasoned-share", "0.25", "--sft.eval-every", "30"]
RL = [
    "--rl.steps",
    str(RL_STEPS),
    "--rl.eval-every",
    "20",
    "--rl.save-every",
    "20",
    "--data.rl-queries",
    "600",
    "--data.rl-documents",
    "3000",
]
LIMITS = ["--max-query-tokens", "32", "--max-document-tokens", "40", "--max-documents", "3000"]
MODES = ("direct", "reason")
SAMPLES = 10_000


def search_r3(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "search_r3_jax", *arguments], check=True)


def finished(run: Path, steps: int) -> bool:
    """Whether the last step of a run has its checkpoint."""
    return (run / "checkpoints" / str(steps)).is_dir()


def watched(run: Path, step: int) -> dict[str, Any]:
    """What the development queries gave at a step, by mode."""
    return json.loads((run / "eval" / f"dev_{step:06d}.json").read_text())["results"][COLLECTION]


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Before and after of each mode, with the paired bootstrap interval of the difference in nDCG@10."""
    found: dict[str, Any] = {}
    kept = ("ndcg@10", "recall@10", "mrr", "valid_rate", "reply_tokens", "milliseconds_per_query")
    for mode in MODES:
        ids = sorted(before[mode]["per_query"])
        first, last = (np.array([each[mode]["per_query"][i] for i in ids]) for each in (before, after))
        gain = bootstrap_interval(last - first, samples=SAMPLES, seed=0)
        numbers = [{name: each[mode][name] for name in kept} for each in (before, after)]
        found[mode] = {
            "before": numbers[0],
            "after": numbers[1],
            "gain": dataclasses.asdict(gain),
            "queries": len(ids),
        }
    return found


def course(run: Path) -> dict[str, Any]:
    """The first and the last ten steps of a run of stage 2, on average, and what all of it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = (
        "reward",
        "valid_rate",
        "reply_tokens",
        "entropy",
        "kl",
        "repetition",
        "zero_group_share",
        "effective_rank",
        "index_age",
    )
    phases = ("rollout_seconds", "environment_seconds", "update_seconds")
    seconds = sum(line["seconds"] for line in lines)

    def mean(some: list[dict[str, Any]]) -> dict[str, float]:
        return {name: round(float(np.mean([line[name] for line in some])), 4) for name in names}

    return {
        "steps": len(lines),
        "minutes": round(seconds / 60, 1),
        "first": mean(lines[:10]),
        "last": mean(lines[-10:]),
        "share_of_time": {name: round(sum(line[name] for line in lines) / seconds, 3) for name in phases},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out, data = given.out, (given.data / COLLECTION).resolve()
    out.mkdir(parents=True, exist_ok=True)
    sft, rl, budget, controls = out / "sft", out / "rl", out / "budget.json", out / "controls.json"
    if not finished(sft, SFT_STEPS):
        search_r3("sft", "--config", "smollm2", "--run", str(sft), "--data.sets", str(data), *TEXT, *SFT)
    if not finished(rl, RL_STEPS):
        start = ["--model", str(sft), "--start-step", "best"]
        search_r3("rl", "--config", "smollm2", "--run", str(rl), "--data.sets", str(data), *start, *TEXT, *RL)
    search_r3("curves", str(sft), str(rl), "--out", str(out / "stage2.png"))
    if not budget.is_file():
        picture = ["--picture", str(out / "budget.png")]
        search_r3("budget", "--model", str(rl), "--data", str(data), *LIMITS, "--out", str(budget), *picture)
    if not controls.is_file():
        search_r3(
            "eval",
            "--model",
            str(rl),
            "--data",
            str(data),
            "--mode",
            "both",
            "--controls",
            *LIMITS,
            "--out",
            str(controls),
        )
    shown = ("ndcg@10", "valid_rate", "reply_tokens", "milliseconds_per_query")
    curve = json.loads(budget.read_text())
    probes = json.loads(controls.read_text())["modes"]["reason"]["controls"]
    record = {
        "collection": COLLECTION,
        "dev": compared(watched(rl, 0), watched(rl, RL_STEPS)),
        "course": course(rl),
        "test_direct": {name: curve["direct"][name] for name in shown}
        | {"interval": curve["direct"]["ndcg@10_interval"]},
        "test_budgets": [
            {name: each[name] for name in ("max_think_tokens", *shown)}
            | {"interval": each["ndcg@10_interval"]}
            for each in curve["budgets"]
        ],
        "test_controls": {
            name: {key: each[key] for key in ("ndcg@10", "reply_tokens", "own_minus_this")}
            for name, each in probes.items()
        },
    }
    (out / "stage2.json").write_text(json.dumps(record, indent=1) + "\n")
    print("| development queries | before | after | gain, 95 % interval |\n|---|---|---|---|")
    for mode, found in record["dev"].items():
        gain = found["gain"]
        scores = " | ".join(f"{found[when]['ndcg@10']:.3f}" for when in ("before", "after"))
        print(f"| {mode} | {scores} | {gain['mean']:+.3f} ({gain['low']:+.3f} … {gain['high']:+.3f}) |")
    print(json.dumps(record["course"], indent=1))


if __name__ == "__main__":
    main()
