"""Stage 1 of SmolLM2 on real collections beside its baselines: `python tests/benchmarks/stage1.py --data FOLDER --out FOLDER`.

Each collection, a BEIR folder in --data, gets a run of `search-r3 sft --config smollm2`, one of them another without the KL term. Its test queries
search a corpus cut to all judged documents and random others, 3,000 in all, the same for every system; beside the runs stand BM25,
all-MiniLM-L6-v2 and the untrained model. General ability is the perplexity on plain sentences of another collection. What is there
already is not done again. Writes stage1.json and stage1.png into --out, and the table to standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COLLECTIONS = ("cosqa", "scifact", "medquad")
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
        search_r3("eval", "--model", model, "--data", str(data), "--max-documents", str(MAX_DOCUMENTS), "--out", str(file), *options)
    return json.loads(file.read_text())


def perplexity(file: Path, model: str, data: Path) -> float:
    """On 500 sentences, from the file where it is there."""
    if not file.is_file():
        search_r3("perplexity", "--model", model, "--data", str(data), "--max-documents", "500", "--max-tokens", "128", "--out", str(file))
    return json.loads(file.read_text())["perplexity"]


def finished(run: Path) -> bool:
    """Whether the last step of a run has its checkpoint."""
    if not (run / "config.json").is_file():
        return False
    steps = json.loads((run / "config.json").read_text())["config"]["sft"]["steps"]
    return (run / "checkpoints" / str(steps)).is_dir()


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a result, and what identifies it; no path, no text."""
    kept = ("ndcg@10", "recall@10", "recall@100", "mrr", "valid_rate", "reply_tokens")
    return {mode: {name: values[name] for name in kept} for mode, values in result["modes"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    plain = given.data / PLAIN_TEXT
    record: dict[str, Any] = {
        "plain_text": PLAIN_TEXT,
        "untrained_perplexity": perplexity(given.out / "untrained_ppl.json", "smollm2", plain),
    }
    rows = []
    for name in COLLECTIONS:
        data, here = given.data / name, {}
        for system in BASELINES:
            result = evaluate(given.out / f"{name}_{system}.json", system, data)
            here[system] = numbers(result)
        record[name] = {"data": result["data"]["cut"], "queries": result["data"]["queries"], "systems": here}
        here["untrained"] = numbers(evaluate(given.out / f"{name}_untrained.json", "smollm2", data, *LIMITS))
        here["untrained"]["perplexity"] = untrained
        for run_name in (name, f"{name}_nokl") if name in WITHOUT_KL else (name,):
            run = given.out / run_name
            settings = ["--sft.kl-weight", "0"] if run_name.endswith("_nokl") else []
            if not finished(run):
                train(run, data, *settings)
            result = evaluate(given.out / f"{run_name}.json", str(run), data, "--mode", "both", *LIMITS)
            trained = numbers(result)
            trained["perplexity"] = perplexity(given.out / f"{run_name}_ppl.json", str(run), plain)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            trained["minutes_of_steps"] = round(sum(line["seconds"] for line in lines) / 60, 1)
            here["stage 1, no KL" if settings else "stage 1"] = trained
        for system, modes in here.items():
            for mode in ("direct", "reason"):
                if mode in modes:
                    ppl = f"{modes['perplexity']:.1f}" if "perplexity" in modes else ""
                    scores = " | ".join(f"{modes[mode][metric]:.3f}" for metric in ("ndcg@10", "recall@10", "mrr"))
                    rows.append(f"| {name} | {system}{', reasoned' if mode == 'reason' else ''} | {scores} | {ppl} |")
    (given.out / "stage1.json").write_text(json.dumps(record, indent=1) + "\n")
    search_r3("curves", *[str(given.out / name) for name in COLLECTIONS], "--out", str(given.out / "stage1.png"))
    print("| collection | system | nDCG@10 | recall@10 | MRR | perplexity |\n|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
