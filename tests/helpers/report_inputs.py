"""Made-up run directories and result files, as training and evaluation write them, for tests of what shows
them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.config import RunConfig
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import FORMAT_VERSION
from search_r3_jax.evaluation.significance import bootstrap_interval

HOSTILE = (
    "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" {{ 7 * 7 }} "
    "\x00\x1b[31m\ud800\u202e"
)


def write_json(file: Path, record: Any) -> Path:
    file.write_text(json.dumps(record))
    return file


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, stage: str, *, steps: int = 40, seed: int = 0) -> list[dict[str, float]]:
    """A run of `steps` steps with its development evaluations and samples; returns its metrics."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(RunConfig(), seed=seed)
    data = {"name": "words", "split": "train", "corpus_hash": "c", "queries_hash": "q"}
    record = {
        "stage": stage,
        "config": dataclasses.asdict(config),
        "data_version": [data] if stage == "sft" else data,
    }
    (folder / "config.json").write_text(json.dumps(record))
    generator = np.random.default_rng(seed)
    metrics = [(sft_step if stage == "sft" else rl_step)(step, steps, generator) for step in range(steps)]
    samples = []
    for done in (0, steps // 2, steps):
        scores = {
            mode: float(generator.uniform(0.4, 0.6) + 0.3 * done / steps) for mode in ("direct", "reason")
        }
        if done:
            metrics[done - 1] |= {f"dev_{mode}_ndcg@10": score for mode, score in scores.items()} | {
                "dev_reason_valid_rate": done / steps
            }
        else:
            (folder / "eval").mkdir()
            modes = {
                mode: {"ndcg@10": score, "valid_rate": 0.0, "per_query": {"q1": score}}
                for mode, score in scores.items()
            }
            (folder / "eval" / "dev_000000.json").write_text(
                json.dumps({"step": 0, "results": {"words": modes}})
            )
        samples += [search_sample(done - 1, mode, generator) for mode in scores]
    if stage == "rl":
        samples += [rollout_sample(step, generator) for step in range(steps)]
        samples.sort(key=lambda sample: sample["step"])
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    return metrics


def sft_step(step: int, steps: int, generator: np.random.Generator) -> dict[str, float]:
    left = np.exp(-4 * step / steps)
    noise = generator.uniform(0.9, 1.1, 4)
    terms = {
        "infonce": 2.5 * left * noise[0],
        "language": (1 + 3 * left) * noise[1],
        "kl": 0.3 * (1 - left) * noise[2],
        "triplet": 0.0,
    }
    return {
        "step": step,
        "loss": float(sum(terms.values())),
        **{name: float(value) for name, value in terms.items()},
        "in_batch_accuracy": float(1 - 0.8 * left),
        "gradient_norm": float(5 * left * noise[3]),
        "skipped": int(step >= 5) + int(step >= 9),
        "seconds": 2.5,
        "save_seconds": 0.5 if step % 10 == 0 else 0.0,
        "tokens_per_second": 1900.0 + step,
        "mfu": 0.31,
    }


def rl_step(step: int, steps: int, generator: np.random.Generator) -> dict[str, float]:
    done, noise = step / steps, generator.uniform(0.9, 1.1, 8)
    age = step % 8 + 3
    line = {
        "step": step,
        "reward": (0.3 + 0.4 * done) * noise[0],
        "reward_best": (0.4 + 0.45 * done) * noise[1],
        "reward_within_group_std": 0.1 * noise[2],
        "zero_group_share": min(1.0, 0.2 + done * 0.3 * noise[3]),
        "valid_rate": min(1.0, (0.6 + 0.4 * done) * noise[4]),
        "reply_tokens": (24 - 10 * done) * noise[5],
        "entropy": (1.8 - done) * noise[6],
        "repetition": 0.05 * noise[7],
        "effective_rank": 20.0 + step,
        "kl": 0.02 * done,
        "policy": 0.01 * (noise[0] - 1),
        "infonce": 1.2 - 0.5 * done,
        "gradient_norm": 0.8 * noise[1],
        "index_step": float(max(step - age, 0)),
        "index_age": float(min(age, step)),
        "reencoded_share": 0.02 * noise[2],
        "reencoded_total_share": 0.02 * (step + 1),
        "candidate_agreement": 0.97,
        "index_stall_share": 0.001,
        "skipped": 0,
        "seconds": 120.0,
        "save_seconds": 0.0,
    }
    if step % 5 == 4:
        line |= {"drift_cosine": 1 - 0.02 * noise[3], "drift_overlap": 0.9 * noise[4]}
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in line.items()}


def search_sample(step: int, mode: str, generator: np.random.Generator) -> dict[str, Any]:
    reasoning = (
        "The user wants an order by one field. key, sorted, lambda. The embedding is <|embed_token|>"
        if mode == "reason"
        else ""
    )
    return {
        "step": step,
        "set": "words",
        "mode": mode,
        "query": "sort a list of dictionaries by one of their keys",
        "reasoning": reasoning,
        "ndcg@10": float(generator.random()),
        "top": [{"document": f"d{at}", "score": 1 - 0.1 * at, "relevant": at == 1} for at in range(3)],
    }


def rollout_sample(step: int, generator: np.random.Generator) -> dict[str, Any]:
    return {
        "step": step,
        "query_id": f"q{step}",
        "query": f"how to read a file line by line without holding all of it in memory ({step})",
        "sample": 0,
        "reply": f"Iterate over the opened file; a generator. open, readline, yield (attempt {step}). The "
        "embedding is <|embed_token|>",
        "valid": bool(step % 4),
        "tokens": 20 + step % 5,
        "reward": float(generator.random()),
        "terms": {"retrieval": 0.5, "format": 0.1},
        "top": [{"document": f"module_{step}.function_{at}", "relevant": at == 0} for at in range(3)],
    }


def eval_record(
    values: dict[str, np.ndarray], *, model: str, name: str = "words", kind: str = "decoder", **system: Any
) -> dict[str, Any]:
    """A record of `eval`; `values` is mode → [Q], from which each metric is made."""
    modes = {}
    for mode, values_q in values.items():
        queries = {
            f"q{i}": {
                "text": f"query {i}",
                **{metric: float(value) / (at + 1) for at, metric in enumerate(METRICS)},
            }
            for i, value in enumerate(values_q)
        }
        means = {metric: float(np.mean([entry[metric] for entry in queries.values()])) for metric in METRICS}
        costs = {
            "valid_rate": 0.875,
            "reply_tokens": 21.5,
            "queries_per_second": 12.0,
            "milliseconds_per_query": 47.25,
        }
        modes[mode] = means | costs | {"per_query": queries}
    count = len(next(iter(values.values())))
    data = {
        "path": "data",
        "name": name,
        "split": "test",
        "documents": 500,
        "queries": count,
        "documents_sha256": "d",
        "queries_sha256": name,
    }
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "system": {"kind": kind, **system},
        "data": data | {"cut": None},
        "modes": modes,
    }


def with_controls(record: dict[str, Any]) -> dict[str, Any]:
    """The record with controls of reasoning, each a tenth below the one before."""
    own = np.array([entry["ndcg@10"] for entry in record["modes"]["reason"]["per_query"].values()])
    controls = {}
    for at, name in enumerate(("own", "swapped", "empty")):
        values = own * (1 - 0.1 * at)
        controls[name] = {
            "ndcg@10": float(values.mean()),
            "reply_tokens": 20.0 - at,
            "ndcg@10_interval": vars(bootstrap_interval(values, samples=200, seed=0)),
            "own_minus_this": vars(bootstrap_interval(own - values, samples=200, seed=0)),
        }
    record["modes"]["reason"]["controls"] = controls
    return record


def budget_record(
    generator: np.random.Generator, *, budgets: tuple[int, ...] = (0, 8, 16, 32, 64), model: str = "runs/rl"
) -> dict[str, Any]:
    """A record of `budget`, of 60 queries."""
    direct = generator.uniform(0.3, 0.9, 60)

    def point(values: np.ndarray, tokens: float) -> dict[str, Any]:
        return {
            **{metric: float(values.mean()) for metric in METRICS},
            "valid_rate": 0.5,
            "reply_tokens": tokens,
            "queries_per_second": 10.0,
            "milliseconds_per_query": 20 + 2 * tokens,
            "ndcg@10_interval": vars(bootstrap_interval(values, samples=200, seed=0)),
        }

    points = []
    for budget in budgets:
        values = np.clip(direct + 0.1 * np.log2(1 + budget) / 6 - 0.03 + generator.normal(0, 0.05, 60), 0, 1)
        gain = vars(bootstrap_interval(values - direct, samples=200, seed=0))
        points.append({"max_think_tokens": budget, **point(values, 5 + 0.7 * budget), "over_direct": gain})
    record = eval_record({"direct": direct}, model=model)
    del record["modes"]
    return record | {"direct": point(direct, 5.0), "budgets": points}
