"""The monitor of a run against brute force and scipy."""

import json
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from search_r3_jax.errors import UserError
from search_r3_jax.rollout.sampler import Rollout
from search_r3_jax.training.monitor import (
    CollapseGuard,
    distinct,
    effective_rank,
    log_prob_mismatch,
    repetition,
    require_learning,
    rollout_health,
    swap_probe,
)


def random_replies(seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 6, size=generator.integers(0, 25)).tolist() for _ in range(12)]


def padded(replies: list[list[int]]) -> np.ndarray:
    """[B,T] int64, −1 beyond a reply's end."""
    rows = np.full((len(replies), max(map(len, replies))), -1, np.int64)
    for row, reply in zip(rows, replies, strict=True):
        row[: len(reply)] = reply
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_distinct_and_repetition_equal_a_count_over_pairs_of_places(seed: int) -> None:
    replies = random_replies(seed)
    for n in (1, 2, 3):
        places = [(r, i) for r, reply in enumerate(replies) for i in range(len(reply)) if i + n <= len(reply)]

        def gram(place: tuple[int, int], n: int = n) -> str:
            return " ".join(map(str, replies[place[0]][place[1] : place[1] + n]))

        new = [
            all(gram(place) != gram(earlier) for earlier in places[:at]) for at, place in enumerate(places)
        ]
        assert distinct(padded(replies), n) == pytest.approx(sum(new) / len(places))
        shares = []
        for r in range(len(replies)):
            own = [place for place in places if place[0] == r]
            if own:
                shares.append(
                    np.mean(
                        [
                            any(gram(place) == gram(earlier) for earlier in own[:at])
                            for at, place in enumerate(own)
                        ]
                    )
                )
        assert repetition(padded(replies), n) == pytest.approx(np.mean(shares))


def test_text_statistics_at_their_ends() -> None:
    assert distinct(padded([[1, 2, 3, 4]]), 2) == 1
    assert distinct(padded([[7] * 9]), 2) == 1 / 8
    assert distinct(padded([[7] * 9, [7] * 9]), 1) == 1 / 18
    assert distinct(padded([[], [1]]), 2) == 0
    # What another reply says is no repetition.
    assert repetition(padded([[1, 2, 3, 4, 5]] * 2), 4) == 0
    assert repetition(padded([[7] * 9, [1]]), 4) == pytest.approx(5 / 6)
    assert repetition(padded([[1], []]), 4) == 0


def test_ngrams_of_a_large_vocabulary_are_told_apart() -> None:
    # 60,000 tokens to the fourth power are beyond 2⁶³.
    generator = np.random.default_rng(3)
    replies = generator.permutation(60_000).reshape(600, 100).tolist()
    replies[1] = replies[0][:50] * 2
    grams = [tuple(reply[i : i + 4]) for reply in replies for i in range(97)]
    assert distinct(padded(replies), 4) == pytest.approx(len(set(grams)) / len(grams))
    own = [tuple(replies[1][i : i + 4]) for i in range(97)]
    assert repetition(padded(replies), 4) == pytest.approx((1 - len(set(own)) / 97) / 600)


def test_effective_rank_equals_scipy_and_counts_equal_directions() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((20, 3)) @ generator.standard_normal(
        (3, 16)
    ) + 0.1 * generator.standard_normal((20, 16))
    for each in (vectors, vectors.T):
        # A decomposition: another way to the same singular values.
        singular = scipy.linalg.svdvals(each)
        assert effective_rank(each) == pytest.approx(np.exp(scipy.stats.entropy(singular)), rel=1e-9)
    # Of few directions among many numbers, whose squares are lost in rounding.
    few = (generator.standard_normal((300, 4)) @ generator.standard_normal((4, 200))).astype(np.float32)
    expected = np.exp(scipy.stats.entropy(scipy.linalg.svdvals(few.astype(np.float64))))
    assert effective_rank(few) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(np.eye(5, 8, dtype=np.float32)) == pytest.approx(5)
    assert effective_rank(np.ones((7, 8), np.float32)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((7, 8), np.float32)) == 0


def rollout_of(chosen: list[list[int]], entropies: np.ndarray, vectors: np.ndarray) -> Rollout:
    """Each reply is what the policy chose, then a forced 99, 98."""
    B, T = len(chosen), max(map(len, chosen)) + 2
    ids, sampled = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for b, reply in enumerate(chosen):
        ids[b, : len(reply) + 2] = [*reply, 99, 98]
        sampled[b, : len(reply)] = True
    return Rollout(
        prompt_ids=np.zeros((1, 4), np.int32),
        prompt_lengths=np.full(1, 4, np.int32),
        ids=ids,
        lengths=np.array([len(reply) + 2 for reply in chosen], np.int32),
        sampled=sampled,
        log_probs=np.zeros((B, T), np.float32),
        entropies=np.where(sampled, entropies[:, :T], 7.0).astype(np.float32),
        vectors=vectors.astype(np.float32),
        valid=np.arange(B) % 4 == 0,
    )


def test_health_is_of_what_the_policy_chose() -> None:
    generator = np.random.default_rng(1)
    chosen = random_replies(1)
    entropies, vectors = generator.random((12, 40)), generator.standard_normal((12, 8))
    found = rollout_health(rollout_of(chosen, entropies, vectors))
    assert found["valid_rate"] == 0.25
    assert found["reply_tokens"] == pytest.approx(np.mean([len(reply) + 2 for reply in chosen]))
    assert found["distinct_1"] == distinct(padded(chosen), 1)
    pairs = [pair for reply in chosen for pair in pairwise(reply)]
    assert found["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert found["repetition"] == repetition(padded(chosen), 4)
    own = np.concatenate([entropies[b, : len(reply)] for b, reply in enumerate(chosen)])
    assert found["entropy"] == pytest.approx(own.mean(), rel=1e-6)


def test_mismatch_looks_at_sampled_tokens_only() -> None:
    trainer, sampler = np.array([[-1.0, -2.0, 0.0]]), np.array([[-1.5, -1.0, 5.0]])
    found = log_prob_mismatch(trainer, sampler, np.array([[True, True, False]]))
    assert found == pytest.approx({"sampler_ratio_min": np.exp(-1.0), "sampler_ratio_max": np.exp(0.5)})
    assert log_prob_mismatch(trainer, sampler, np.zeros((1, 3), bool)) == {
        "sampler_ratio_min": 1.0,
        "sampler_ratio_max": 1.0,
    }


LOW = {"valid_rate": 0.1, "entropy": 1.0}
FINE = {"valid_rate": 0.9, "entropy": 1.0}
FLAT = {"valid_rate": 0.9, "entropy": 0.01}


def guard() -> CollapseGuard:
    return CollapseGuard(valid_below=0.5, entropy_below=0.1, steps=3)


def stops_at(watched: CollapseGuard, steps: list[dict[str, float]], first: int = 0) -> int | None:
    for step, values in enumerate(steps, start=first):
        try:
            watched.observe(step, **values)
        except UserError:
            return step
    return None


def test_only_steps_in_a_row_under_the_same_threshold_are_a_collapse() -> None:
    assert stops_at(guard(), [LOW, LOW, LOW]) == 2
    assert stops_at(guard(), [LOW, LOW, FINE, LOW, LOW, FINE]) is None
    assert stops_at(guard(), [LOW, LOW, FLAT, FLAT, LOW, LOW]) is None
    assert stops_at(guard(), [FINE, FLAT, FLAT, FLAT]) == 3
    assert stops_at(guard(), [{"valid_rate": 0.5, "entropy": 0.1}] * 9) is None
    assert stops_at(guard(), [{"valid_rate": 0.9, "entropy": float("nan")}] * 9) == 2
    assert stops_at(CollapseGuard(valid_below=0.5, entropy_below=0.1, steps=0), [LOW] * 9) is None
    assert (
        stops_at(
            CollapseGuard(valid_below=0.0, entropy_below=0.0, steps=1),
            [{"valid_rate": 0.0, "entropy": 0.0}] * 9,
        )
        is None
    )


def test_a_collapse_is_one_line_that_says_where_and_what_to_do() -> None:
    watched = CollapseGuard(valid_below=0.5, entropy_below=0.1, steps=1)
    with pytest.raises(UserError) as error:
        watched.observe(7, **LOW)
    assert "\n" not in str(error.value)
    for part in ("step 7", "valid_rate", "0.5", "rl.optimizer.learning_rate"):
        assert part in str(error.value)


@pytest.mark.parametrize("kept_at", range(1, 6))
def test_a_resumed_guard_stops_at_the_same_step(kept_at: int) -> None:
    steps = [LOW, FINE, LOW, FLAT | {"valid_rate": 0.1}, FLAT, FLAT, FLAT]
    whole = stops_at(guard(), steps)
    assert whole == 5
    before, after = guard(), guard()
    assert stops_at(before, steps[:kept_at]) is None
    after.restore(json.loads(json.dumps(before.state())))
    assert stops_at(after, steps[kept_at:], kept_at) == whole


def test_swap_probe_equals_a_paired_test_over_queries() -> None:
    generator = np.random.default_rng(2)
    own, exchanged = generator.random((9, 4)).astype(np.float32), generator.random((9, 4)).astype(np.float32)
    own[0] = exchanged[0]
    found = swap_probe(own, exchanged)
    a, b = own.astype(np.float64).mean(-1), exchanged.astype(np.float64).mean(-1)
    assert found["swap_gain"] == pytest.approx((a - b).mean())
    assert found["swap_gain"] / found["swap_gain_error"] == pytest.approx(
        scipy.stats.ttest_rel(a, b).statistic
    )
    assert found["swap_wins"] == pytest.approx(((a > b).sum() + 0.5) / 9)
    assert np.isnan(swap_probe(own[:1], exchanged[:1])["swap_gain_error"])


def test_a_run_that_skipped_every_step_has_learnt_nothing() -> None:
    for skipped, steps in ((0, 0), (0, 3), (2, 3)):
        require_learning(skipped, steps, "sft")
    with pytest.raises(UserError, match="learning_rate: none of the 3 steps was finite"):
        require_learning(3, 3, "rl")
