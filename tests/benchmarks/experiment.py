"""The whole method on eight real collections: `python tests/benchmarks/experiment.py ACT --data FOLDER --out
FOLDER`.

`train` takes SmolLM2 through stage 1 on the training queries of all collections (BEIR folders in --data), and
`train --seed S` from there through stage 2 on those of the four that the method is aimed at; `watch` searches
for development queries of these. Settings are chosen by that: only training and development queries are read.
`evaluate` searches for the test queries, the only act that does, with the --systems that are asked for: a
baseline, the last checkpoint of stage 1, or with --seed S the best one of stage 2 by its development queries.
All go on where they were interrupted. `record` gathers what is there into the folder experiment beside this
file, a file a system, beside what was gathered before; `experiment_table.py` reads it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import load_collection, splits_of
from search_r3_jax.data.subsample import sample_queries

RECORDS = Path(__file__).parent / "experiment"
AIMED_AT = ("cosqa", "mbpp", "entailmentbank", "strategyqa")
# Collection → its share of stage 1's batches.
SHARES = {
    "cosqa": 3,
    "medquad": 3,
    "squad_sent": 1,
    "strategyqa": 2,
    "conala": 2,
    "entailmentbank": 2,
    "scifact": 1,
    "mbpp": 1,
}
MERGED = "merged"
# Of each collection that stage 2 trains on.
RL_QUERIES, RL_DEV_QUERIES = 200, 48

TEXT = ["--text.max-document-tokens", "40"]
SFT = [
    *[
        "--seed",
        "0",
        "--data.batches",
        "one_set",
        "--sft.steps",
        "90",
        "--sft.global-batch",
        "24",
        "--sft.reasoned-share",
        "0.25",
    ],
    # Stage 2 begins with the development queries of its collections.
    *["--sft.key-terms", "4", "--sft.eval-every", "0", "--sft.save-every", "10", "--data.dev-queries", "32"],
]
RL = [
    *["--data.dev-queries", str(RL_DEV_QUERIES * len(AIMED_AT)), "--data.dev-documents", "250"],
    *[
        "--rl.steps",
        "45",
        "--rl.global-queries",
        "8",
        "--rl.group-size",
        "4",
        "--rl.beta",
        "0",
        "--rl.infonce.weight",
        "1",
    ],
    *["--rl.infonce.negatives", "128", "--rl.sampler.max-think-tokens", "28", "--rl.sample-every", "4"],
    *["--index.refresh-budget", "32", "--index.candidates", "32"],
]
# The only limits of an evaluation, the same for every system; the last two are for models of ours.
CUT = ["--max-queries", "1400", "--max-documents", "3000"]
LIMITS = ["--max-query-tokens", "32", "--max-document-tokens", "40"]
THINK = ["--max-think-tokens", "28"]
# Stage 2 as it is evaluated, and what was tried before.
TRIED = ["--rl.optimizer.learning-rate", "3e-4", "--rl.eval-every", "45", "--rl.save-every", "20"]
STAGE_2 = {
    # One index is built while training: another would be ready when nobody asks it any more.
    "rl": [
        "--rl.min-tokens",
        "12",
        "--rl.optimizer.learning-rate",
        "2e-4",
        "--rl.eval-every",
        "15",
        "--rl.save-every",
        "23",
    ],
    "rl-faster": [*TRIED, "--rl.min-tokens", "12"],
    "rl-alike": [*TRIED, "--rl.min-tokens", "12", "--rl.infonce.near-duplicate-cosine", "0.8"],
    "rl-documents": [*TRIED, "--rl.min-tokens", "12", "--rl.infonce.train-documents"],
    "rl-free": TRIED,
}
STAGES = ("sft", *STAGE_2)
BASELINES = ("bm25", "bm25-split", "minilm", "untrained")
METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr", "map")
COSTS = ("valid_rate", "reply_tokens", "milliseconds_per_query")


def search_r3(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "search_r3_jax", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("act", choices=("train", "watch", "evaluate", "record"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of stage 2")
    parser.add_argument(
        "--sets", nargs="+", choices=tuple(SHARES), default=tuple(SHARES), help="evaluate these alone"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=(*BASELINES, *STAGES),
        default=("sft",),
        help="train, watch or evaluate these",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.act == "record":
        write_records(given.out)
    for system in [] if given.act == "record" else given.systems:
        if given.act == "evaluate":
            evaluate_on_test(given.data, given.out, system, given.seed, given.sets)
        elif system in BASELINES:
            parser.error(f"{given.act}: --systems {system}: a baseline is not trained")
        elif given.act == "train":
            train(given.data, given.out, system, given.seed)
        else:
            watch(given.data, given.out, system, given.seed)


def label_of(system: str, seed: int) -> str:
    """The name of a run, of a folder of results and of a record."""
    return f"{system}_seed{seed}" if system in STAGE_2 else system


def train(data: Path, out: Path, stage: str, seed: int) -> None:
    """A stage; finished steps are not repeated."""
    run = ["--config", "smollm2", "--run", str(out / label_of(stage, seed)), *TEXT]
    if stage == "sft":
        sets = [
            "--data.sets",
            *(str(data / name) for name in SHARES),
            "--data.weights",
            *map(str, SHARES.values()),
        ]
        search_r3("sft", *run, *sets, *SFT)
    else:
        merge(data, out / MERGED)
        sets = ["--data.sets", str(out / MERGED)]
        search_r3("rl", *run, "--model", str(out / "sft"), "--seed", str(seed), *sets, *RL, *STAGE_2[stage])


def watch(data: Path, out: Path, stage: str, seed: int) -> None:
    """The development queries of what stage 2 trains on, in all modes and with the controls."""
    merge(data, out / MERGED)
    label = label_of(stage, seed)
    model = [*model_of(out, stage, seed), "--mode", "all", "--controls"]
    evaluate(
        out / MERGED,
        out / "results_dev" / label / f"{MERGED}.json",
        *model,
        "--max-documents",
        "1000",
        *LIMITS,
        *THINK,
        split="dev",
    )


def merge(data: Path, folder: Path) -> None:
    """One BEIR folder of `RL_QUERIES` training and `RL_DEV_QUERIES` development queries of each collection,
    and the documents they judge.

    Where a collection has no development queries, more training queries are drawn and the last of them
    watched.
    """
    texts: dict[str, str] = {}
    documents: dict[str, str] = {}
    judged: dict[str, list[str]] = {"train": [], "dev": []}

    def add(split: str, collection: Collection) -> None:
        bodies = {document.doc_id: document.body for document in collection.documents}
        for query in collection.queries:
            asked = f"{collection.name}-{query.query_id}"
            texts[asked] = query.text
            for doc_id, score in query.positives.items():
                found = f"{collection.name}-{doc_id}"
                documents[found] = bodies[doc_id]
                judged[split].append(f"{asked}\t{found}\t{score}")

    for name in AIMED_AT:
        if "dev" in splits_of(data / name):
            add("train", sample_queries(load_collection(data / name, "train"), RL_QUERIES)[0])
            add("dev", sample_queries(load_collection(data / name, "dev"), RL_DEV_QUERIES)[0])
        else:
            drawn, _ = sample_queries(load_collection(data / name, "train"), RL_QUERIES + RL_DEV_QUERIES)
            add("train", replace(drawn, queries=drawn.queries[:RL_QUERIES]))
            add("dev", replace(drawn, queries=drawn.queries[RL_QUERIES:]))
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / "corpus.jsonl",
        [json.dumps({"_id": each, "title": "", "text": text}) for each, text in documents.items()],
    )
    write_lines(
        folder / "queries.jsonl", [json.dumps({"_id": each, "text": text}) for each, text in texts.items()]
    )
    for split, rows in judged.items():
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))


def evaluate_on_test(data: Path, out: Path, system: str, seed: int, sets: list[str]) -> None:
    """A system on the test queries of these collections; ours in all modes, stage 2 with the controls of its
    reasoning where it aims."""
    for name in sets:
        if system in STAGES:
            controls = ["--controls"] if system != "sft" and name in AIMED_AT else []
            options = [*model_of(out, system, seed), "--mode", "all", *LIMITS, *THINK, *controls]
        elif system == "untrained":
            options = ["--model", "smollm2", *LIMITS]
        else:
            options = ["--model", system]
        evaluate(data / name, out / "results" / label_of(system, seed) / f"{name}.json", *CUT, *options)


def model_of(out: Path, stage: str, seed: int) -> list[str]:
    """The last checkpoint of stage 1, and of stage 2 the best by its development queries."""
    run = ["--model", str(out / label_of(stage, seed))]
    return run if stage == "sft" else [*run, "--step", "best"]


def evaluate(data: Path, file: Path, *options: str, split: str = "test") -> None:
    """`eval` of a split, unless its file is there."""
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    search_r3("eval", "--data", str(data), "--split", split, "--out", str(file), *options)


def write_records(out: Path) -> None:
    """What was measured, as small files: no path, no text but the settings. What was recorded before and not
    measured again stays."""
    for results, records in ((out / "results", RECORDS), (out / "results_dev", RECORDS / "dev")):
        records.mkdir(exist_ok=True)
        for folder in sorted(results.glob("*")):
            file, run = records / f"{folder.name}.json", out / folder.name
            record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"results": {}}
            record["results"] |= {
                found.stem: small(json.loads(found.read_text())) for found in sorted(folder.glob("*.json"))
            }
            if (run / "metrics.jsonl").is_file():
                record["run"] = course(run)
            file.write_text(json.dumps(record, indent=1) + "\n")


def small(result: dict[str, Any]) -> dict[str, Any]:
    """What a table, an interval and a paired test need of a result; nDCG@10 of the queries in the order of
    their ids."""
    modes: dict[str, Any] = {}
    for mode, values in result["modes"].items():
        modes[mode] = {name: values[name] for name in (*METRICS, *COSTS)}
        modes[mode]["of_query"] = compact(
            [values["per_query"][query_id]["ndcg@10"] for query_id in sorted(values["per_query"])]
        )
        if "controls" in values:
            modes[mode]["controls"] = {
                name: {key: each[key] for key in ("ndcg@10", "reply_tokens", "own_minus_this")}
                | {
                    "of_query": compact(
                        [each["per_query"][query_id] for query_id in sorted(each["per_query"])]
                    )
                }
                for name, each in values["controls"].items()
            }
    data = {name: value for name, value in result["data"].items() if name != "path"}
    system = {name: value for name, value in result["system"].items() if name != "run_config"}
    return {"data": data, "system": system, "modes": modes}


def compact(values: list[float]) -> str:
    """Numbers to six digits, in one string: a file of lists has a line a number."""
    return " ".join(f"{value:.6g}" for value in values)


def course(run: Path) -> dict[str, Any]:
    """A run's settings, its hours, what its development queries gave, and means of its first and last
    steps."""
    config = json.loads((run / "config.json").read_text())["config"]
    config |= {
        "model": Path(config["model"]).name,
        "data": config["data"] | {"sets": [Path(each).name for each in config["data"]["sets"]]},
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {}
    for file in sorted((run / "eval").glob("dev_*.json")):
        results = json.loads(file.read_text())["results"]
        scores[file.stem] = {
            name: {mode: values["ndcg@10"] for mode, values in modes.items()}
            for name, modes in results.items()
        }
    names = [name for name, value in lines[0].items() if isinstance(value, int | float) and name in lines[-1]]
    tenth = max(1, len(lines) // 10)

    def mean(some: list[dict[str, Any]]) -> dict[str, float]:
        return {name: float(f"{sum(line[name] for line in some) / len(some):.6g}") for name in names}

    return {
        "config": config,
        "steps": len(lines),
        "hours": round(sum(line["seconds"] for line in lines) / 3600, 3),
        "dev": scores,
        "first_tenth": mean(lines[:tenth]),
        "last_tenth": mean(lines[-tenth:]),
    }


if __name__ == "__main__":
    main()
