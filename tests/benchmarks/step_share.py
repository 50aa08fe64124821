"""What the host does in a step of stage 2, beside the devices' bound for that step.

    python tests/benchmarks/step_share.py [--rows 2000000] [--steps 20]

128 queries × 16 replies of width 1,536 over two million documents, with random vectors: the acts of a step as
training calls them, but for rollout, search and encoding, whose time is the devices' or the index's. The
bound is that of the kept plans for Qwen2.5-1.5B on v5e-16: writing the replies, and the update.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from search_r3_jax.config import RunConfig
from search_r3_jax.configs.qwen25_1p5b import config as qwen25_1p5b
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.rollout.sampler import Rollout
from search_r3_jax.training import rl_acts
from search_r3_jax.training.index_state import IndexStatistics
from search_r3_jax.training.led_index import LedIndex
from search_r3_jax.training.live_index import make_environment
from search_r3_jax.training.monitor import effective_rank
from search_r3_jax.training.rl_report import step_scalars
from search_r3_jax.training.rl_session import RANK_EVERY

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_suffix(".json")
WIDTH, DIFFERENT = 1536, 65_536


class RandomIndex:
    """Finds random documents; its vectors repeat, so that they fit into memory. Counts its own seconds."""

    kind, version, ids_hash = "exact", 0, "random"

    def __init__(self, rows: int):
        self.shape = (rows, WIDTH)
        self.seconds = 0.0
        self._generator = np.random.default_rng(0)
        vectors = self._generator.normal(size=(DIFFERENT, WIDTH)).astype(np.float32)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q,k] descending, and different rows [Q,k]."""
        started = time.perf_counter()
        Q = len(queries)
        starts = self._generator.integers(0, self.shape[0], (Q, 1))
        rows = (starts + np.arange(k) * 7919) % self.shape[0]
        scores = -np.sort(-self._generator.random((Q, k)).astype(np.float32), axis=1)
        self.seconds += time.perf_counter() - started
        return scores, rows.astype(np.int32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Vectors [n,E] of rows [n]."""
        return self._vectors[rows % DIFFERENT]

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """As if they were encoded anew."""
        started = time.perf_counter()
        vectors = self._vectors[(rows + 1) % DIFFERENT]
        self.seconds += time.perf_counter() - started
        return vectors


def rollout_of(config: RunConfig, generator: np.random.Generator) -> Rollout:
    """Random replies of the config's sizes."""
    Q, B = config.rl.global_queries, config.rl.global_queries * config.rl.group_size
    T, S = config.rl.sampler.max_think_tokens + 5, config.text.max_query_tokens
    vectors = generator.normal(size=(B, WIDTH)).astype(np.float32)
    return Rollout(
        prompt_ids=generator.integers(0, 1000, (Q, S), dtype=np.int32),
        prompt_lengths=np.full(Q, S, np.int32),
        ids=generator.integers(0, 1000, (B, T), dtype=np.int32),
        lengths=np.full(B, T, np.int32),
        sampled=np.ones((B, T), bool),
        log_probs=-generator.random((B, T)).astype(np.float32),
        entropies=generator.random((B, T)).astype(np.float32),
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        valid=np.ones(B, bool),
    )


def measure(rows: int, steps: int) -> dict[str, Any]:
    """Median seconds of each part of a step."""
    generator = np.random.default_rng(1)
    config = dataclasses.replace(
        qwen25_1p5b, index=dataclasses.replace(qwen25_1p5b.index, kind="exact", scoring="fresh")
    )
    index = RandomIndex(rows)
    environment = make_environment(config, cast(Any, index), index.encode)
    live = cast(Any, SimpleNamespace(environment=environment))
    led = LedIndex(Team(), live, Path(), IndexStatistics(), drift_every=0)
    stage = cast(
        Any,
        SimpleNamespace(
            config=config, current=None, collection=SimpleNamespace(documents=range(rows)), mesh=None
        ),
    )
    found: dict[str, list[float]] = {"score": [], "batch": [], "metrics": []}
    for step in range(steps):
        own = generator.choice(rows, config.rl.global_queries, replace=False)
        sampled = rl_acts.Sampled(
            queries=[cast(Any, SimpleNamespace(body="a query"))] * len(own),
            positives=[{int(row): 1} for row in own],
            rollout=rollout_of(config, generator),
            seconds=1.0,
            waited=0.0,
        )
        index.seconds, started = 0.0, time.perf_counter()
        scored = rl_acts.score(stage, cast(Any, None), sampled, led, step)
        found["score"].append(time.perf_counter() - started - index.seconds)
        started = time.perf_counter()
        rl_acts.make_update_batch(stage, sampled, scored)
        found["batch"].append(time.perf_counter() - started)
        started = time.perf_counter()
        metrics = step_scalars(sampled.rollout, scored.result, sampled.rollout.log_probs, 1.0)
        json.dumps(metrics)
        found["metrics"].append(time.perf_counter() - started)
    # The first steps compile.
    medians = {name: statistics.median(values[steps // 4 :]) for name, values in found.items()}
    started = time.perf_counter()
    effective_rank(rollout_of(config, generator).vectors)
    medians["effective_rank"] = (time.perf_counter() - started) / RANK_EVERY
    return medians


def bound() -> float:
    """Least seconds of the devices, by the kept plans: the replies, and the update."""
    seconds = 0.0
    for name in ("Qwen2.5-1.5B/v5e-16/decode", "experiments/qwen25_1p5b/v5e-16/rl"):
        plan = json.loads((ROOT / "launch/plans" / f"{name}.json").read_text())
        seconds += plan["tokens"] / plan["tokens_per_second"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    parts, least = measure(asked.rows, asked.steps), bound()
    host = sum(parts.values())
    share = host / (host + least)
    RESULT.write_text(
        json.dumps({"rows": asked.rows, "seconds": parts, "devices_bound": least, "share": share}, indent=1)
        + "\n"
    )
    for name, seconds in parts.items():
        print(f"{name:16} {1000 * seconds:8.1f} ms")
    print(f"host {1000 * host:.0f} ms beside {1000 * least:.0f} ms of the devices: {share:.1%} of a step")


if __name__ == "__main__":
    main()
