"""Reports on a step of stage 2: scalars, sample rollouts, and reward terms without a signal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.evaluation.run_files import shown_text
from search_r3_jax.retrieval.environment.environment import StepResult
from search_r3_jax.retrieval.environment.rewards import constant_terms, within_group_variance
from search_r3_jax.rollout.sampler import Rollout, rollout_throughput
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.monitor import log_prob_mismatch, rollout_health

# Steps without variance in any group after which a term is reported.
CONSTANT_STEPS = 5
logger = logging.getLogger(__name__)


def reward_scalars(result: StepResult) -> dict[str, float]:
    """Mean reward, its spread within groups, the share of constant groups, and statistics of each term.

    Each term has its mean and its variance within groups.
    """
    Q, G = result.rewards.shape
    within = result.rewards.std(axis=-1)
    variances = within_group_variance(
        {name: term.reshape(-1) for name, term in result.terms.items()}, np.repeat(np.arange(Q), G)
    )
    return {
        "reward": float(result.rewards.mean()),
        "reward_best": float(result.rewards.max(axis=-1).mean()),
        "reward_within_group_std": float(within.mean()),
        "zero_group_share": float(np.mean(np.ptp(result.rewards, axis=-1) == 0)),
        **{f"reward_{name}": float(term.mean()) for name, term in result.terms.items()},
        **{f"reward_{name}_variance": variance for name, variance in variances.items()},
    }


def step_scalars(
    rollout: Rollout, result: StepResult, log_probs_bt: np.ndarray, rollout_seconds: float
) -> dict[str, float]:
    """All scalars about a step's rollouts; `log_probs_bt` are the trainer's, before the update."""
    return {
        **rollout_health(rollout),
        **rollout_throughput(rollout, rollout_seconds),
        **log_prob_mismatch(log_probs_bt, rollout.log_probs, rollout.sampled),
        **reward_scalars(result),
        **{name: float(value) for name, value in result.stats.items()},
    }


class ConstantTerms:
    """Warns once of each reward term that was constant within every group for `CONSTANT_STEPS` steps.

    The advantages cancel such a term.
    """

    def __init__(self) -> None:
        self._steps, self._named = dict[str, int](), set[str]()

    def observe(self, step: int, scalars: Mapping[str, float]) -> None:
        """Count the terms without variance in the scalars of `reward_scalars`."""
        variances = {
            name.removesuffix("_variance"): value
            for name, value in scalars.items()
            if name.endswith("_variance")
        }
        constant = set(constant_terms(variances))
        self._steps = {name: self._steps.get(name, 0) + 1 for name in constant}
        for name in sorted(constant - self._named):
            if self._steps[name] == CONSTANT_STEPS:
                self._named.add(name)
                logger.warning(
                    f"step {step}: {name} was constant within every group for {CONSTANT_STEPS} "
                    "steps: it teaches nothing"
                )


def sample_records(
    step: int,
    every: int,
    queries: Sequence[Query],
    rollout: Rollout,
    result: StepResult,
    prompter: Prompter,
    collection: Collection,
) -> list[dict[str, Any]]:
    """Records of every `every`-th rollout of a run: query, reply, reward by term, best documents.

    Rollouts are counted from the run's first.
    """
    B, G = len(rollout.lengths), result.rewards.shape[1]
    records = []
    for b in range(-(step * B) % every, B, every):
        q, g = divmod(b, G)
        top = [int(row) for row in result.top_rows[q, g] if row >= 0]
        records.append(
            {
                "step": step,
                "query_id": queries[q].query_id,
                "query": queries[q].text,
                "sample": g,
                "reply": prompter.thought_text(rollout.ids[b, : rollout.lengths[b]].tolist()),
                "valid": bool(rollout.valid[b]),
                "tokens": int(rollout.lengths[b]),
                "reward": float(result.rewards[q, g]),
                "terms": {name: float(term[q, g]) for name, term in result.terms.items()},
                "top": [
                    {
                        "document": collection.documents[row].doc_id,
                        "text": shown_text(collection.documents[row].body),
                        "relevant": collection.documents[row].doc_id in queries[q].positives,
                    }
                    for row in top
                ],
            }
        )
    return records
