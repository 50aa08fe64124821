"""Whether a finished reply should make room for a waiting one: `python tests/benchmarks/sampling.py [--rounds
N] [--out FILE]`.

SmolLM2-135M, float32, temperature 1. All rows at once, a fixed number of slots that are refilled, and one
pass after the other of as many rows, in turns within each round, so that other work on the machine meets all
of them; the medians of seconds and of ratios count, of wall-clock and of processor time. `even`: 8 queries ×
8 samples × 32 tokens, which hardly anybody ends early. `uneven`: as many rows of up to 128 tokens, where the
head is biased towards the embed token, so that a reply ends with one chance in 32 a token. `choice`: seconds
of drawing a token for 64 rows, beside those of a whole step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import SamplerConfig
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.rollout import sampling_program
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds, rollout_throughput
from search_r3_jax.rollout.token_sampling import SampledToken, sample_token
from search_r3_jax.text.prompts import Prompter

QUERIES = [
    "how do plants make sugar",
    "sort a list of tuples by their second element in python",
    "who wrote the origin of species",
    "effects of vitamin d deficiency on bone density in older adults",
    "difference between tcp and udp",
    "symptoms of iron deficiency",
    "parse a json file line by line",
    "capital of the country whose currency is the zloty",
]
GROUP, SLOTS, QUERY_TOKENS = 8, 16, 32
SHORTER = 4
"""How much shorter than the budget the replies of the uneven case are on average, but for those that the
budget cuts."""


def ending(embed_id: int, chance: float) -> Callable[..., SampledToken]:
    """`choose`, with a logit of the embed token that gives it this chance."""

    def choose_or_end(logits_bv: jax.Array, *arguments: jax.Array, **settings: Any) -> SampledToken:
        others = jax.nn.logsumexp(logits_bv.at[:, embed_id].set(-jnp.inf), axis=-1)
        return sample_token(
            logits_bv.at[:, embed_id].set(others + np.log(chance / (1 - chance))), *arguments, **settings
        )

    return choose_or_end


def replies_case(decoder: Decoder, prompter: Prompter, budget: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way to write the same replies."""
    graph, state = nnx.split(decoder)
    at_once, slotted = (
        Sampler(graph, prompter, SamplerConfig(max_think_tokens=budget, temperature=1.0, slots=slots))
        for slots in (0, SLOTS)
    )

    def passes(seeds: np.ndarray) -> list[Rollout]:
        queries = SLOTS // GROUP
        starts = range(0, len(QUERIES), queries)
        return [
            at_once.sample(state, QUERIES[i : i + queries], seeds[i : i + queries], max_tokens=QUERY_TOKENS)
            for i in starts
        ]

    ways: dict[str, Callable[[np.ndarray], list[Rollout]]] = {
        "at_once": lambda seeds: [at_once.sample(state, QUERIES, seeds, max_tokens=QUERY_TOKENS)],
        "slots": lambda seeds: [slotted.sample(state, QUERIES, seeds, max_tokens=QUERY_TOKENS)],
        "passes": passes,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    same: dict[str, list[float]] = {name: [] for name in ways}
    lengths: list[np.ndarray] = []
    # Round 0 compiles.
    for number in range(rounds + 1):
        seeds = rollout_seeds(0, number, range(len(QUERIES)), GROUP)
        first: np.ndarray | None = None
        for name, way in ways.items():
            started, busy_before = time.perf_counter(), time.process_time()
            rollouts = way(seeds)
            taken, worked = time.perf_counter() - started, time.process_time() - busy_before
            ids = np.concatenate([rollout.ids for rollout in rollouts])
            first = ids if first is None else first
            if number:
                seconds[name].append(taken)
                busy[name].append(worked)
                rates[name].append(
                    sum(
                        rollout_throughput(rollout, taken)["rollout_tokens_per_second"]
                        for rollout in rollouts
                    )
                )
                same[name].append(float(np.mean(np.all(ids == first, axis=-1))))
        if number:
            lengths.append(np.concatenate([rollout.lengths for rollout in rollouts]))
            print(
                number,
                {
                    name: (round(seconds[name][-1], 2), round(busy[name][-1], 2), same[name][-1])
                    for name in ways
                },
                flush=True,
            )
    written = np.concatenate(lengths)
    return {
        "tokens": {"mean": round(float(written.mean()), 1), "longest": int(written.max())},
        **{
            name: {
                "seconds": round(median(seconds[name]), 3),
                "tokens_per_second": round(median(rates[name]), 1),
                "times_at_once": round(
                    median(a / b for a, b in zip(seconds[name], seconds["at_once"], strict=True)), 3
                ),
                "processor_times_at_once": round(
                    median(a / b for a, b in zip(busy[name], busy["at_once"], strict=True)), 3
                ),
                "same_replies": min(same[name]),
            }
            for name in ways
        },
    }


def choice_case(vocabulary: int, rows: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a draw for `rows` rows."""
    logits = 5 * jax.random.normal(jax.random.key(0), (rows, vocabulary))
    keys, steps = jax.random.split(jax.random.key(1), rows), jnp.zeros((rows,), jnp.int32)
    settings = {
        "greedy": (0.0, 0, 1.0, True),
        "sampled": (1.0, 0, 1.0, True),
        "sampled_without_entropy": (1.0, 0, 1.0, False),
        "top_k_50": (1.0, 50, 1.0, True),
        "top_p_0.9": (1.0, 0, 0.9, True),
        "top_k_50_top_p_0.9": (1.0, 50, 0.9, True),
    }

    def drawing(temperature: float, top_k: int, top_p: float, entropy: bool) -> Callable[..., Any]:
        def draw(logits: jax.Array, keys: jax.Array, steps: jax.Array) -> Any:
            choice = sample_token(logits, keys, steps, temperature=temperature, top_k=top_k, top_p=top_p)
            return choice if entropy else choice[:2]

        return jax.jit(draw)

    ways = {name: drawing(*values) for name, values in settings.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            jax.block_until_ready(way(logits, keys, steps))
            if number:
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(median(times), 1) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--even", type=int, default=32, help="tokens of the even case")
    parser.add_argument("--uneven", type=int, default=128, help="budget of the uneven case")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("smollm2")
    prompter = Prompter(model.tokenizer)
    found: dict[str, Any] = {
        "choice_ms": choice_case(model.decoder.config.vocab_size, len(QUERIES) * GROUP, 5 * arguments.rounds)
    }
    print(found, flush=True)
    found["even"] = replies_case(model.decoder, prompter, arguments.even, arguments.rounds)
    print(found["even"], flush=True)
    with mock.patch.object(
        sampling_program, "sample_token", ending(model.embed_id, SHORTER / arguments.uneven)
    ):
        found["uneven"] = replies_case(model.decoder, prompter, arguments.uneven, arguments.rounds)
    print(found["uneven"], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
