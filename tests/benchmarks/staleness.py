"""What a stale index costs: rewards held against full re-encoding, and what is learned, by the index's age,
with and without the overlay.

    python tests/benchmarks/staleness.py planted --out FOLDER
        a tiny model learns a planted table; one training a setting
    python tests/benchmarks/staleness.py real --data FOLDER --out FOLDER
        SmolLM2-135M on a real collection; one training in all
    python tests/benchmarks/staleness.py varied --out FOLDER
        the same run's ends, on replies that differ more
    python tests/benchmarks/staleness.py picture
        staleness.json to staleness.png

Ages are those of the running system: while an index of period A is in use, the next one is being made, from
the checkpoint of the step at which this one came into use. So its age runs from A to 2A − 1 steps; at age 0
the whole corpus is encoded at every step. The periods are 0, 1, 10 and 30 times `PERIOD`. Agreement is
Kendall's τ-b between the rewards and those of the same completions when the whole corpus has been encoded
with the current parameters: over all completions of a step, and within groups, where GRPO compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from stale_environment import PERIOD, SETTINGS, SHARE_A_PERIOD, agreement, summary, watch

from search_r3_jax.config import SamplerConfig
from search_r3_jax.configs.smollm2 import config as smollm2
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import TrainingSet, for_stage_2, load_training_sets
from search_r3_jax.files import write_json
from search_r3_jax.hub.checkpoint_reader import latest_checkpoint, read_checkpoint, read_run
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.retrieval.environment.drift import measure_drift, probe_rows
from search_r3_jax.retrieval.environment.environment import Environment, StepResult
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.rollout.encoder import Encoder, ReasonedEncoder
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import rl
from search_r3_jax.training.rl_acts import reencode_rollout
from search_r3_jax.training.run import RlRecord
from search_r3_jax.training.sft import train_sft

HERE = Path(__file__).parent
RESULT = HERE / "staleness.json"
PLANTED_STEPS = 130


def planted(out: Path, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What stage 2 learns on the planted task over 4,096 documents in each setting; the tests' model, task
    and settings."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "training")]
    task = importlib.import_module("test_planted")
    results: dict[str, Any] = {}
    for seed in seeds:
        start = task.start_of_stage_2(Path(tempfile.mkdtemp(dir=out)), seed, distractors=4032)
        start = start._replace(
            config=dataclasses.replace(
                start.config, rl=dataclasses.replace(start.config.rl, steps=PLANTED_STEPS)
            )
        )
        for setting in [each for each in SETTINGS if not names or each.name in names]:
            started = time.perf_counter()
            log = watch(setting, measured_at=range(2 * PERIOD - 1, start.config.rl.steps, 8))
            before, after, steps = task.stage_2(start, f"rl-{setting.times}-{setting.overlay}")
            shares = [values["reencoded_share"] for values in steps]
            result = {
                "before": round(before.reason, 4),
                "after": round(after.reason, 4),
                "direct": round(after.direct, 4),
                "reencoded_a_default_period": round(float(np.mean(shares)) * PERIOD, 4),
                "reward": [round(values["reward"], 4) for values in steps[::10]],
                "seconds": round(time.perf_counter() - started),
                **summary(log),
            }
            results.setdefault(setting.name, {})[str(seed)] = result
            print(
                seed,
                setting.name,
                {key: value for key, value in result.items() if key != "reward"},
                flush=True,
            )
            write_json(out / "planted.json", results)
    return results


def real(
    out: Path, data: Path, *, model: str, documents: int, learning_rate: float, steps: int
) -> dict[str, Any]:
    """Agreement on a real collection along one training of SmolLM2, of every setting on the same
    completions."""
    config = dataclasses.replace(
        smollm2,
        model=model,
        data=dataclasses.replace(
            smollm2.data, sets=(str(data.resolve()),), dev_queries=0, rl_queries=400, rl_documents=documents
        ),
        text=dataclasses.replace(smollm2.text, max_query_tokens=32, max_document_tokens=32),
        sft=dataclasses.replace(smollm2.sft, steps=36, eval_every=0),
    )
    out.mkdir(parents=True, exist_ok=True)
    sets = [dataclasses.replace(load_training_sets(config.data)[0], dev=None)]
    base = load_model(model, compute_dtype="float32", remat="dots")
    adapted = with_lora(base, config.lora, seed=0)
    train_sft(config, out / "sft", sets=sets, model=adapted, on_step=report)

    measured = [steps - before for before in (11, 7, 3)]
    rl_config = dataclasses.replace(
        config.rl,
        steps=steps,
        global_queries=4,
        group_size=8,
        eval_every=0,
        save_every=10**6,
        sampler=dataclasses.replace(config.rl.sampler, max_think_tokens=12),
        optimizer=dataclasses.replace(config.rl.optimizer, learning_rate=learning_rate),
    )
    config = dataclasses.replace(
        config,
        model=str((out / "sft").resolve()),
        rl=rl_config,
        index=dataclasses.replace(config.index, kind="exact", candidates=32),
    )
    chosen = for_stage_2(load_training_sets(config.data)[0], config.data)
    train = TrainingSet(train=chosen.train, dev=None)
    build_dataset({"train": train.train}, out / "data", name="chosen", source={"kind": "benchmark"})
    log = watch(SETTINGS[-1], others=SETTINGS[:-1], measured_at=measured, lead=PERIOD)
    start = with_lora(load_model(out / "sft", compute_dtype="float32", remat="dots"), config.lora, seed=0)
    record = RlRecord(data="../data", split="train", start="../sft")
    rl.train_rl(config, out / "rl", data=train, model=start, record=record, on_step=report)
    write_json(out / "real-steps.json", log)
    lines = {setting.name: [line for line in log if line["setting"] == setting.name] for setting in SETTINGS}
    result = {
        "documents": len(train.train.documents),
        "steps": steps,
        "learning_rate": learning_rate,
        "settings": {
            name: summary(of) | {"reencoded_a_default_period": PERIOD * summary(of)["reencoded_share"]}
            for name, of in lines.items()
        },
    }
    write_json(out / "real.json", result)
    return result


def varied(out: Path, *, batches: int = 12) -> dict[str, Any]:
    """Agreement between the first and the last checkpoint of `real`'s run, on replies that differ: those of
    its first policy.

    The trained policy writes next to nothing, so that the completions of a group hardly differ. Here 4
    queries × 8 replies a batch are sampled with the first checkpoint's parameters, embedded with the last
    one's, and rewarded by the index of the first.
    """
    config, _ = read_run(out / "rl")
    collection = load_collection(out / "data", "train")
    model = with_lora(load_model(out / "sft", compute_dtype="float32", remat="dots"), config.lora, seed=0)
    _, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    full, prompter = nnx.split(model.decoder)[0], Prompter(model.tokenizer)
    last = latest_checkpoint(out / "rl") or 0
    first_state, last_state = (
        nnx.merge_state(read_checkpoint(out / "rl", step, params), frozen) for step in (0, last)
    )
    encoder, reasoned = Encoder(full, prompter), ReasonedEncoder(full, prompter)
    sampler = Sampler(
        full, prompter, SamplerConfig(max_think_tokens=config.rl.sampler.max_think_tokens, temperature=1.0)
    )
    ids, bodies = (
        [document.doc_id for document in collection.documents],
        [document.body for document in collection.documents],
    )
    stale, current = (
        ExactIndex(encoder.encode(state, bodies, max_tokens=config.text.max_document_tokens), ids, step)
        for state, step in ((first_state, 0), (last_state, last))
    )
    Q, G, budget = 4, 8, round(SHARE_A_PERIOD * len(ids) / PERIOD)
    options: dict[str, Any] = {"candidates": config.index.candidates}
    lines: dict[str, list[dict[str, float]]] = {"index alone": [], "overlay": []}
    for batch in range(batches):
        chosen = [batch * Q + q for q in range(Q)]
        texts = [collection.queries[i].text for i in chosen]
        rollout = sampler.sample(
            first_state, texts, rollout_seeds(1, batch, chosen, G), max_tokens=config.text.max_query_tokens
        )
        # Where the budget ran out the embed token was forced; such a reply serves as well here.
        rollout = dataclasses.replace(rollout, valid=np.ones_like(rollout.valid))
        vectors = reencode_rollout(
            reasoned, last_state, texts, rollout, config.text.max_query_tokens
        ).reshape(Q, G, -1)
        positives = [
            {collection.row_of[doc_id]: grade for doc_id, grade in collection.queries[i].positives.items()}
            for i in chosen
        ]
        valid = np.ones((Q, G), bool)

        def score(
            index: ExactIndex, refresh_budget: int, at: Any = (positives, vectors, valid)
        ) -> StepResult:
            return Environment(index, current.take, refresh_budget=refresh_budget, **options).score(last, *at)

        truth = score(current, 0).rewards
        for name, allowed in (("index alone", 0), ("overlay", budget)):
            result = score(stale, allowed)
            lines[name].append(
                agreement(result.rewards, truth) | {"reencoded_share": result.stats["reencoded_share"]}
            )
        print(batch, {name: round(of[-1]["tau"], 3) for name, of in lines.items()}, flush=True)
    rows = probe_rows(len(ids), 1000)
    drift = measure_drift(stale.take(rows), current.take(rows))
    means = {
        name: {key: round(float(np.nanmean([line[key] for line in of])), 4) for key in of[0]}
        for name, of in lines.items()
    }
    return {
        "steps": last,
        "batches": batches,
        "drift_cosine": drift.cosine,
        "drift_overlap": drift.overlap,
        **means,
    }


def report(done: int, total: int, values: dict[str, float]) -> None:
    told = {
        name: round(values[name], 3)
        for name in ("loss", "reward", "valid_rate", "reencoded_share", "seconds")
        if name in values
    }
    print(f"step {done} of {total}", told, flush=True)


def picture(result: dict[str, Any], file: Path) -> None:
    """Agreement over the age, and what is learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    tables = {
        "planted task, tiny model": planted_means(result["planted"]),
        "real collection, SmolLM2-135M": result["real"]["settings"],
    }
    for axis, (title, table) in zip(axes, tables.items(), strict=False):
        for overlay, label, style in ((False, "index alone", "o--"), (True, "with the overlay", "o-")):
            chosen = [s for s in SETTINGS if s.overlay == overlay or s.times == 0]
            axis.plot(
                [str(s.times) + "×" for s in chosen],
                [table[s.name]["tau"] for s in chosen],
                style,
                label=label,
            )
        axis.axhline(0.98, color="grey", linewidth=0.8, linestyle=":")
        axis.set(
            title=f"rewards: {title}", xlabel="age of the index", ylabel="Kendall τ with full re-encoding"
        )
        axis.legend(frameon=False)
    means = tables["planted task, tiny model"]
    for overlay, label, style in ((False, "index alone", "o--"), (True, "with the overlay", "o-")):
        chosen = [s for s in SETTINGS if s.overlay == overlay or s.times == 0]
        axes[2].plot(
            [str(s.times) + "×" for s in chosen], [means[s.name]["after"] for s in chosen], style, label=label
        )
    axes[2].set(
        title="learned on the planted task",
        xlabel="age of the index",
        ylabel="nDCG@10 after stage 2",
        ylim=(0, 1.02),
    )
    axes[2].legend(frameon=False)
    figure.savefig(file, dpi=110)


def planted_means(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each setting's numbers, averaged over the seeds."""
    numbers = {
        name: {key for key, value in next(iter(seeds.values())).items() if isinstance(value, (int, float))}
        for name, seeds in results.items()
    }
    return {
        name: {key: float(np.mean([seed[key] for seed in seeds.values()])) for key in numbers[name]}
        for name, seeds in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("planted", "real", "varied", "picture"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--documents", type=int, default=3072)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=31 * PERIOD + 10)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--settings", nargs="*", default=[], help="only these lines of the planted table")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.what == "picture":
        picture(result, HERE / "staleness.png")
        return
    if options.out is None:
        parser.error("--out: missing; name a folder for the runs")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "planted":
        result["planted"] = planted(options.out, options.seeds, options.settings)
    elif options.what == "varied":
        result["varied"] = varied(options.out)
        print(result["varied"])
    else:
        if options.data is None:
            parser.error("--data: missing; name a data set with 2,000 documents or more")
        result["real"] = real(
            options.out,
            options.data,
            model=options.model,
            documents=options.documents,
            learning_rate=options.learning_rate,
            steps=options.steps,
        )
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
