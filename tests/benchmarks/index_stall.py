"""Is training held up by its index? Steps beside a working indexer against steps beside a halted one, and the
time a swap takes.

    python tests/benchmarks/index_stall.py --data FOLDER [--out FOLDER]

*Steps.* Stage 2 of SmolLM2-135M with the trainer on core 0 and the indexer on core 1, in one run. A
checkpoint is saved at every step, so the indexer always has a newer one to encode; in every other block of
steps it is halted (SIGSTOP). What is compared are medians of a step's seconds; `stall` is what the trainer
spent on its index: taking in versions, and waiting.

*Swap.* Two published versions of 100,000 × 576 vectors; while the second is being opened in the background,
the foreground multiplies matrices, and then takes it in. The pieces that a swap consists of are timed, and
the slowest of the foreground's own steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.config import CollapseConfig, IndexConfig, LoraConfig, RunConfig
from search_r3_jax.configs.smollm2 import config as smollm2
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.data.development import TrainingSet, for_stage_2, load_training_sets
from search_r3_jax.files import write_json
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.retrieval.environment.environment import Environment
from search_r3_jax.retrieval.index.protocol import IndexKind
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.heartbeat import read_beat
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.retrieval.store.versions import PublishOptions, publish_version
from search_r3_jax.training.live_index import LiveIndex
from search_r3_jax.training.rl import train_rl
from search_r3_jax.training.run import RlRecord

RESULT = Path(__file__).with_suffix(".json")
BLOCK, BLOCKS, WARM_UP = 5, 6, 4
WORKING = ("reading", "encoding", "publishing")


def steps(data: Path, out: Path) -> dict[str, Any]:
    """Seconds of a step beside a working and beside a halted indexer."""
    os.sched_setaffinity(0, {0})
    config = dataclasses.replace(
        smollm2,
        model="smollm2",
        lora=LoraConfig(rank=16),
        data=dataclasses.replace(
            smollm2.data, sets=(str(data.resolve()),), dev_queries=0, rl_queries=64, rl_documents=512
        ),
        text=dataclasses.replace(smollm2.text, max_query_tokens=32, max_document_tokens=32),
        rl=dataclasses.replace(
            smollm2.rl,
            steps=WARM_UP + BLOCK * BLOCKS,
            global_queries=4,
            group_size=4,
            eval_every=0,
            save_every=1,
            collapse=CollapseConfig(steps=0),
            sampler=dataclasses.replace(smollm2.rl.sampler, max_think_tokens=12),
        ),
        index=dataclasses.replace(
            smollm2.index, candidates=16, refresh_budget=32, cores=(1,), threads=1, nice=0
        ),
    )
    train = TrainingSet(train=for_stage_2(load_training_sets(config.data)[0], config.data).train, dev=None)
    build_dataset({"train": train.train}, out / "data", name="stall", source={"kind": "benchmark"})
    lines: list[dict[str, float]] = []
    busy: list[str] = []

    def on_step(done: int, total: int, values: dict[str, float]) -> None:
        beat = read_beat(out / "run")
        assert beat is not None
        busy.append(beat.phase)
        lines.append(values)
        print(
            f"step {done} of {total}: {values['seconds']:.2f} s, indexer "
            f"{'on' if is_on(done - 1) else 'halted'}, {beat.phase}",
            flush=True,
        )
        if is_on(done) != is_on(done - 1):
            os.kill(beat.pid, signal.SIGCONT if is_on(done) else signal.SIGSTOP)
        if done == total:
            os.kill(beat.pid, signal.SIGCONT)

    model = with_lora(load_model("smollm2", compute_dtype="float32", remat="dots"), config.lora, seed=0)
    record = RlRecord(data="../data", split="train")
    train_rl(config, out / "run", data=train, model=model, record=record, on_step=on_step)
    counted = [
        (is_on(step), line, phase)
        for step, line, phase in zip(range(len(lines)), lines, busy, strict=True)
        if step >= WARM_UP
    ]
    # A step without a swap beside one without: what is taken in is in `stall`.
    working, halted = (
        [line["seconds"] for on, line, _ in counted if on == wanted] for wanted in (True, False)
    )
    stalls = [line["swap_seconds"] + line["index_wait_seconds"] for _, line, _ in counted]
    return {
        "steps_each": len(working),
        "seconds_beside_working": round(statistics.median(working), 3),
        "seconds_beside_halted": round(statistics.median(halted), 3),
        "slowdown": round(statistics.median(working) / statistics.median(halted) - 1, 4),
        "stall_share": round(sum(stalls) / sum(line["seconds"] for _, line, _ in counted), 5),
        "swaps": len({line["index_step"] for line in lines}) - 1,
        "indexer_busy_share": round(float(np.mean([phase in WORKING for on, _, phase in counted if on])), 3),
        "documents": len(train.train.documents),
    }


def is_on(step: int) -> bool:
    """Whether the indexer works during a step."""
    return step < WARM_UP or (step - WARM_UP) // BLOCK % 2 == 0


def swap(out: Path, kind: IndexKind, rows: int, dim: int) -> dict[str, float]:
    """What taking in a version of rows × dim costs the foreground."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    run = out / f"swap-{kind}"
    run.mkdir(parents=True, exist_ok=True)
    fields = {
        "parameter_hash": "p",
        "corpus_hash": "c",
        "embed_token_id": 0,
        "pooling": "embed_token",
        "encode_seconds": 0.0,
    }
    generator, ids = np.random.default_rng(0), [f"document-{row}" for row in range(rows)]

    def publish(step: int) -> None:
        vectors = generator.standard_normal((rows, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        # Random vectors are no test of recall.
        publish_version(
            index_folder(run),
            step=step,
            vectors=vectors,
            ids=ids,
            manifest_fields=fields,
            options=PublishOptions(kind=kind, recall_gate=0.0),
        )

    publish(1)
    follower = IndexFollower(run, "c", 0, settings=IndexConfig(local=False))
    follower.start()
    try:
        environment = Environment(
            follower.wait_for_newer(None, at_most=1), lambda rows: np.zeros((len(rows), dim), np.float32)
        )
        live = LiveIndex(
            run,
            RunConfig(),
            follower,
            environment,
            IndexSchedule(run),
        )
        a = generator.standard_normal((800, 800), dtype=np.float32)

        def foreground() -> float:
            started = time.perf_counter()
            np.matmul(a, a, out=product)
            return time.perf_counter() - started

        product = np.empty_like(a)
        alone = [foreground() for _ in range(300)]
        publish(2)
        published, beside, taken = time.perf_counter(), list[float](), {}
        while environment.index.version == 1:
            beside.append(foreground())
            started = time.perf_counter()
            live.before_step(len(beside) - 1, lambda: None)
            taken = {"swap_seconds": time.perf_counter() - started}
        return {
            **taken,
            "open_seconds": time.perf_counter() - published,
            "foreground_step_alone": statistics.median(alone),
            "foreground_step_beside": statistics.median(beside),
            "foreground_slowest_beside": max(beside),
        }
    finally:
        follower.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=576)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp())
    result: dict[str, Any] = {
        "steps": steps(options.data, out),
        "swap": {"rows": options.rows, "dim": options.dim},
    }
    print(result["steps"])
    for kind in ("exact", "scann"):
        measured = swap(out, kind, options.rows, options.dim)
        result["swap"][kind] = {name: round(seconds, 5) for name, seconds in measured.items()}
        print(kind, result["swap"][kind])
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
