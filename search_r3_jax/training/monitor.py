"""Health metrics of stage 2 beyond the reward: replies, embeddings, and the gain from reasoning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search_r3_jax.errors import UserError
from search_r3_jax.rollout.sampler import Rollout

REPEATED_NGRAM = 4


def rollout_health(rollout: Rollout) -> dict[str, float]:
    """Named scalars of a rollout; text and entropy are of the tokens that the policy chose.

    `valid_rate`, `reply_tokens` (mean length), `distinct_1`, `distinct_2`, `repetition` (all in [0, 1] but
    the length), `entropy` (mean, in nats a token).
    """
    chosen = chosen_tokens(rollout)
    return {
        "valid_rate": float(rollout.valid.mean()),
        "reply_tokens": float(rollout.lengths.mean()),
        "distinct_1": distinct(chosen, 1),
        "distinct_2": distinct(chosen, 2),
        "repetition": repetition(chosen, REPEATED_NGRAM),
        "entropy": float(rollout.entropies[rollout.sampled].mean(dtype=np.float64))
        if rollout.sampled.any()
        else 0.0,
    }


def require_learning(skipped: int, steps: int, stage: str) -> None:
    """Raise UserError where no step of a finished run was finite: nothing was learnt."""
    if steps and skipped == steps:
        raise UserError(
            f"{stage}.optimizer.learning_rate: none of the {steps} steps was finite, so nothing was learnt; "
            "look at the losses in metrics.jsonl, and begin again with another --run"
        )


def chosen_tokens(rollout: Rollout) -> np.ndarray:
    """The tokens [B,T] int64 that the policy chose, each reply's first in its row, then −1."""
    rows, places = np.nonzero(rollout.sampled)
    chosen = np.full(rollout.ids.shape, -1, np.int64)
    chosen[rows, (np.cumsum(rollout.sampled, axis=1) - 1)[rows, places]] = rollout.ids[rows, places]
    return chosen


def distinct(replies_bt: np.ndarray, n: int) -> float:
    """Share of distinct n-grams among all n-grams of the replies (distinct-n), in [0, 1].

    Replies [B,T] int64 end with −1. arXiv 1510.03055; 0 where there are no n-grams.
    """
    grams = _ngrams(replies_bt, n)
    grams = grams[grams >= 0]
    return len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def repetition(replies_bt: np.ndarray, n: int) -> float:
    """Share of repeated n-grams in a reply, in [0, 1], averaged over the replies.

    Replies [B,T] int64 end with −1. Those shorter than n count for nothing; 0 where all are.
    """
    grams = np.sort(_ngrams(replies_bt, n), axis=1)
    there = grams >= 0
    new = there & (np.diff(grams, axis=1, prepend=-1) != 0)
    counts = there.sum(axis=1)
    long_enough = counts > 0
    if not long_enough.any():
        return 0.0
    return float(np.mean(1 - new.sum(axis=1)[long_enough] / counts[long_enough]))


def _ngrams(replies_bt: np.ndarray, n: int) -> np.ndarray:
    """Numbers [B,T−n+1] int64 of the n-grams, equal where they are; −1 beyond a reply's end."""
    ends = replies_bt[:, n - 1 :] < 0
    there = np.zeros(replies_bt.max(initial=0) + 1, bool)
    there[replies_bt[replies_bt >= 0]] = True
    # Few of a vocabulary occur in a step: their numbers are small.
    tokens = (np.cumsum(there) - 1)[replies_bt]
    kinds = max(int(there.sum()), 1)
    grams, size = tokens, kinds
    for k in range(1, n):
        if size * kinds >= 2**63:
            found, numbers = np.unique(grams, return_inverse=True)
            grams, size = numbers.reshape(grams.shape), len(found)
        grams, size = grams[:, :-1] * kinds + tokens[:, k:], size * kinds
    return np.where(ends, -1, grams)


def effective_rank(vectors_be: np.ndarray) -> float:
    """Effective rank of vectors [B,E]: exp of the entropy of their singular values' shares.

    Roy & Vetterli, 2007. From 1 to min(B,E); 0 where all vectors are zero. Within 1e-5 of its value.
    """
    vectors = vectors_be.astype(np.float64)
    products = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    # Squares of the singular values, in a sixth of the time of a decomposition.
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(products), 0))
    if not singular.any():
        return 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def log_prob_mismatch(trainer: np.ndarray, sampler: np.ndarray, sampled: np.ndarray) -> dict[str, float]:
    """Smallest and largest probability ratio of trainer to sampler over the `sampled` tokens.

    All arrays have one shape. `sampler_ratio_min` and `sampler_ratio_max` are of exp(trainer − sampler):
    about 1 while both have the same policy. A log-probability in float32 depends on the order of additions:
    on SmolLM2 a cached decoder and a teacher-forced pass agree within 1 ± 5e-5. Old log-probabilities of a
    policy gradient therefore come from the trainer's forward pass; these metrics check that both have the
    same policy.
    """
    ratio = np.exp(trainer.astype(np.float64) - sampler)[sampled]
    low, high = (float(ratio.min()), float(ratio.max())) if ratio.size else (1.0, 1.0)
    return {"sampler_ratio_min": low, "sampler_ratio_max": high}


@dataclass(kw_only=True)
class CollapseGuard:
    """Stops a run whose replies have collapsed for several steps in a row.

    Attributes:
        valid_below: a step with a lower valid rate is a low one; 0 never is.
        entropy_below: a step with a lower entropy, in nats a token, is a low one; 0 never is.
        steps: low steps in a row that count as a collapse; 0 never stops.
        valid_low, entropy_low: low steps in a row up to now, all that a resumed run needs.
    """

    valid_below: float
    entropy_below: float
    steps: int
    valid_low: int = 0
    entropy_low: int = 0

    def observe(self, step: int, *, valid_rate: float, entropy: float) -> None:
        """Count a step; raises UserError when it is the last of `steps` low ones.

        NaN is low.
        """
        # Count both before judging either, so that the state is complete when this raises.
        self.valid_low = 0 if valid_rate >= self.valid_below else self.valid_low + 1
        self.entropy_low = 0 if entropy >= self.entropy_below else self.entropy_low + 1
        seen = (
            ("valid_rate", valid_rate, self.valid_below, self.valid_low),
            ("entropy", entropy, self.entropy_below, self.entropy_low),
        )
        for name, value, threshold, low in seen:
            if self.steps > 0 and low >= self.steps:
                raise UserError(
                    f"stage 2, step {step}: {name}: below {threshold:g} for {low} steps in a row "
                    f"({value:.3g} now); "
                    "go on from an earlier checkpoint with a lower rl.optimizer.learning_rate or a higher "
                    "rl.beta"
                )

    def state(self) -> dict[str, int]:
        """The counters for a checkpoint, as JSON."""
        return {"valid_low": self.valid_low, "entropy_low": self.entropy_low}

    def restore(self, state: dict[str, int]) -> None:
        """Resume from the counters of `state`."""
        self.valid_low, self.entropy_low = int(state["valid_low"]), int(state["entropy_low"])


def swap_probe(original_qg: np.ndarray, exchanged_qg: np.ndarray) -> dict[str, float]:
    """Gain in reward [Q,G] of a query's reasoning over that of another query (by a `derangement`).

    `swap_gain` (mean of original − exchanged), `swap_gain_error` (its standard error over queries: samples of
    one query are not independent) and `swap_wins` (share of queries that score higher with their reasoning; a
    tie counts half). With a gain near 0 the reasoning has no effect.
    """
    gain_q = (original_qg.astype(np.float64) - exchanged_qg).mean(axis=-1)
    error = float(gain_q.std(ddof=1) / np.sqrt(len(gain_q))) if len(gain_q) > 1 else float("nan")
    wins = float(np.mean((gain_q > 0) + 0.5 * (gain_q == 0)))
    return {"swap_gain": float(gain_q.mean()), "swap_gain_error": error, "swap_wins": wins}
