"""Stage 1 of SmolLM2 on real collections beside its baselines: `python tests/benchmarks/stage1.py --data
FOLDER --out FOLDER`.

Each collection, a BEIR folder in --data, gets a run of `search-r3 sft --config smollm2`, one of them another
without the KL term. Its test queries search a corpus cut to all judged documents and random others, 3,000 in
all, the same for every system; beside the runs stand BM25, all-MiniLM-L6-v2 and the untrained model. General
ability is the perplexity on plain sentences of another collection. What is there already is not done again.
Writes stage1.json and stage1.png into --out, and the table to standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COLLECTIONS = ("cosqa", "scifact", "medquad")
STEPS = {"cosqa": 80, "scifact": 50, "medquad": 50}
# MedQuAD has 1,361 test queries, which take long to reason about.
MODES = {"cosqa": "both", "scifact": "both", "medquad": "direct"}
WITHOUT_KL = ("scifact",)
PLAIN_TEXT = "strategyqa"
MAX_DOCUMENTS = 3000
LIMITS = ["--max-query-tokens", "32", "--max-document-tokens", "96"]
BASELINES = ("bm25", "bm25-split", "minilm")


def search_r3(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "search_r3_jax", *arguments], check=True)


def train(run: Path, data: Path, *settings: str) -> None:
    """Runs stage 1 to its end; finished steps are not repeated."""
    search_r3("sft", "--config", "smollm2", "--run", str(run), "--data.sets", str(data), *settings)


def evaluate(file: Path, model: str, data: Path, *options: str) -> dict[str, Any]:
    """The result of `eval`, from the file where it is there."""
    if not file.is_file():
        search_r3(
            "eval",
            "--model",
            model,
            "--data",
            str(data),
            "--max-documents",
            str(MAX_DOCUMENTS),
            "--out",
            str(file),
            *options,
        )
    return json.loads(file.read_text())


def perplexity(file: Path, model: str, data: Path) -> float:
    """On 500 sentences, from the file where it is there."""
    if not file.is_file():
        search_r3(
            "perplexity",
            "--model",
            model,
            "--data",
            str(data),
            "--max-documents",
            "500",
            "--max-tokens",
            "128",
            "--out",
            str(file),
        )
    return json.loads(file.read_text())["perplexity"]


def finished(run: Path) -> bool:
    """Whether the last step of a run has its checkpoint."""
    if not (run / "config.json").is_file():
        return False
    steps = json.loads((run / "config.json").read_text())["config"]["sft"]["steps"]
    return (run / "checkpoints" / str(steps)).is_dir()


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a result; no path, no text."""
    kept = ("ndcg@10", "recall@10", "recall@100", "mrr", "valid_rate", "reply_tokens")
    return {mode: {name: values[name] for name in kept} for mode, values in result["modes"].items()}


def trained(out: Path, name: str, data: Path, plain: Path, mode: str, *settings: str) -> dict[str, Any]:
    """Trains, unless that is done, and measures a run of this name."""
    run = out / name
    if not finished(run):
        train(run, data, *settings)
    found = numbers(evaluate(out / f"{name}.json", str(run), data, "--mode", mode, *LIMITS))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    minutes = round(sum(line["seconds"] for line in lines) / 60, 1)
    return {
        **found,
        "perplexity": perplexity(out / f"{name}_ppl.json", str(run), plain),
        "steps": len(lines),
        "minutes": minutes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    plain = given.data / PLAIN_TEXT
    untrained = perplexity(out / "untrained_ppl.json", "smollm2", plain)
    record: dict[str, Any] = {"plain_text": PLAIN_TEXT, "collections": {}}
    for name in COLLECTIONS:
        data = given.data / name
        results = {system: evaluate(out / f"{name}_{system}.json", system, data) for system in BASELINES}
        results["untrained"] = evaluate(out / f"{name}_untrained.json", "smollm2", data, *LIMITS)
        systems = {system: numbers(result) for system, result in results.items()}
        systems["untrained"]["perplexity"] = untrained
        systems["stage 1"] = trained(out, name, data, plain, MODES[name], "--sft.steps", str(STEPS[name]))
        of_data = results["untrained"]["data"]
        record["collections"][name] = {
            "cut": of_data["cut"],
            "queries": of_data["queries"],
            "systems": systems,
        }
    for name in WITHOUT_KL:
        settings = ["--sft.steps", str(STEPS[name]), "--sft.kl-weight", "0", "--sft.eval-every", "0"]
        found = trained(out, f"{name}_nokl", given.data / name, plain, "direct", *settings)
        record["collections"][name]["systems"]["stage 1 without KL"] = found
    (out / "stage1.json").write_text(json.dumps(record, indent=1) + "\n")
    search_r3("curves", *[str(out / name) for name in COLLECTIONS], "--out", str(out / "stage1.png"))
    print("\n".join(table(record)))


def table(record: dict[str, Any]) -> list[str]:
    """Markdown, a line a system and mode."""
    lines = ["| collection | system | nDCG@10 | recall@10 | MRR | perplexity |", "|---|---|---|---|---|---|"]
    for name, collection in record["collections"].items():
        for system, found in collection["systems"].items():
            for mode in [mode for mode in ("direct", "reason") if mode in found]:
                label = f"{system}, reasoned" if mode == "reason" else system
                scores = " | ".join(
                    f"{found[mode][metric]:.3f}" for metric in ("ndcg@10", "recall@10", "mrr")
                )
                shown = f"{found['perplexity']:.1f}" if "perplexity" in found else ""
                lines.append(f"| {name} | {label} | {scores} | {shown} |")
    return lines


if __name__ == "__main__":
    main()
