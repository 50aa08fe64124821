"""The environment on vectors that drift, against rewards computed here from all current vectors."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from search_r3_jax.errors import EmbeddingError
from search_r3_jax.retrieval.environment.environment import Environment
from search_r3_jax.retrieval.environment.negatives import drop_near_duplicates, infonce_document_rows
from search_r3_jax.retrieval.index.exact import ExactIndex

ROWS, DIM, QUERIES, GROUP = 120, 16, 4, 5
IDS = [f"d{row}" for row in range(ROWS)]


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def corpus(step: int) -> np.ndarray:
    """Document vectors as the parameters of `step` encode them."""
    start, drift = (np.random.default_rng(seed).normal(size=(ROWS, DIM)) for seed in (0, 1))
    return unit(start + 0.05 * step * drift)


def index(step: int) -> ExactIndex:
    return ExactIndex(corpus(step), IDS, step)


class Encoder:
    """Encodes with the parameters of `step` and remembers what it was asked."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.calls: list[list[int]] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        assert rows.dtype == np.int32
        self.calls.append(rows.tolist())
        return corpus(self.step)[rows]


def batch(seed: int = 2) -> tuple[list[dict[int, float]], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positives = [{3: 1.0}, {17: 1.0, 40: 2.0}, {99: 1.0}, {5: 1.0, 6: 1.0}]
    targets = np.stack([corpus(10)[list(grades)].mean(axis=0) for grades in positives])
    vectors = unit(targets[:, None, :] + 0.25 * rng.normal(size=(QUERIES, GROUP, DIM)))
    valid = np.ones((QUERIES, GROUP), bool)
    valid[0, 2] = valid[2, :4] = False
    vectors[0, 2] = np.nan
    return positives, vectors, valid


def brute_force_reward(
    query: np.ndarray, documents: np.ndarray, grades: Mapping[int, float], pool: Mapping[int, object]
) -> float:
    """Soft nDCG in float64, loops only; positives of one grade are ordered hard among themselves."""
    scores = {row: float(query.astype(np.float64) @ documents[row].astype(np.float64)) for row in pool}
    gained = 0.0
    for row, grade in grades.items():
        rank = 1.0
        for other, score in scores.items():
            if other == row:
                continue
            if grades.get(other) == grade:
                rank += score > scores[row]
            else:
                rank += 1 / (1 + math.exp(min(700, -(score - scores[row]) / 0.02)))
        gained += grade / math.log2(1 + rank)
    ideal = sum(
        grade / math.log2(place + 2) for place, grade in enumerate(sorted(grades.values(), reverse=True))
    )
    return 0.1 + 0.9 * gained / ideal


def expected_rewards(documents: np.ndarray) -> np.ndarray:
    """Rewards over the whole corpus under `documents`."""
    positives, vectors, valid = batch()
    pool = dict.fromkeys(range(ROWS))
    return np.array(
        [
            [
                brute_force_reward(vectors[q, g], documents, positives[q], pool) if valid[q, g] else 0.0
                for g in range(GROUP)
            ]
            for q in range(QUERIES)
        ]
    )


def environment(
    encoder: Callable[[np.ndarray], np.ndarray],
    *,
    index_step: int = 0,
    candidates: int = ROWS,
    per_completion: int = 8,
    refresh_budget: int = ROWS,
    overlay_max_age_steps: int = 0,
) -> Environment:
    return Environment(
        index(index_step),
        encoder,
        candidates=candidates,
        per_completion=per_completion,
        refresh_budget=refresh_budget,
        overlay_max_age_steps=overlay_max_age_steps,
    )


def test_everything_reencoded_equals_brute_force_with_current_vectors() -> None:
    result = environment(Encoder(10)).score(10, *batch())
    np.testing.assert_allclose(result.rewards, expected_rewards(corpus(10)), atol=1e-5)
    assert np.abs(result.rewards - expected_rewards(corpus(0))).max() > 0.05
    assert result.rewards.dtype == np.float32
    assert result.stats["reencoded_share"] == result.stats["candidate_fresh_share"] == 1.0
    assert {name: result.stats[name] for name in ("index_step", "policy_step", "index_age")} == {
        "index_step": 0.0,
        "policy_step": 10.0,
        "index_age": 10.0,
    }
    assert all(type(value) is float for value in result.stats.values())

    _, vectors, valid = batch()
    best = np.argsort(-(np.nan_to_num(vectors) @ corpus(10).T), axis=2)[:, :, :3]
    np.testing.assert_array_equal(result.top_rows, np.where(valid[:, :, None], best, -1))


def test_without_budget_the_stale_vectors_decide() -> None:
    encoder = Encoder(10)
    result = environment(encoder, refresh_budget=0).score(10, *batch())
    np.testing.assert_allclose(result.rewards, expected_rewards(corpus(0)), atol=1e-5)
    assert encoder.calls == []
    assert result.stats["reencoded"] == result.stats["overlay_size"] == 0.0


def test_positives_are_refreshed_first_then_the_best() -> None:
    encoder = Encoder(10)
    positives, vectors, valid = batch()
    result = environment(encoder, refresh_budget=10).score(10, positives, vectors, valid)
    (asked,) = encoder.calls
    known = {row for grades in positives for row in grades}
    assert set(asked[: len(known)]) == known
    scores = np.where(valid[:, :, None], np.nan_to_num(vectors) @ corpus(0).T, -np.inf).max(axis=(0, 1))
    others = [row for row in np.argsort(-scores).tolist() if row not in known]
    assert asked[len(known) :] == others[: 10 - len(known)]
    assert result.stats["reencoded"] == len(asked) == 10


def test_positives_are_candidates_even_where_the_index_hides_them() -> None:
    encoder = Encoder(10)
    far = {
        q: int(np.argmin(corpus(0) @ unit(batch()[1][q][batch()[2][q]].sum(axis=0)))) for q in range(QUERIES)
    }
    positives = [{far[q]: 1.0} for q in range(QUERIES)]
    result = environment(encoder, candidates=5, per_completion=2).score(10, positives, *batch()[1:])
    assert set(far.values()) <= set(encoder.calls[0])
    assert (result.rewards[batch()[2]] > 0).all()
    assert len(encoder.calls[0]) <= QUERIES * 6


def test_each_completion_meets_its_own_nearest_documents() -> None:
    encoder = Encoder(0)
    positives, vectors, valid = batch()
    environment(encoder, candidates=8, per_completion=1).score(0, positives, vectors, valid)
    own = np.argmax(np.nan_to_num(vectors) @ corpus(0).T, axis=2)[valid]
    assert set(own.tolist()) <= set(encoder.calls[0])


def test_overlay_is_reused_until_it_is_too_old() -> None:
    encoder = Encoder(10)
    subject = environment(encoder, overlay_max_age_steps=3)
    subject.score(10, *batch())
    encoder.step = 13
    later = subject.score(13, *batch())
    np.testing.assert_allclose(later.rewards, expected_rewards(corpus(10)), atol=1e-5)
    assert (len(encoder.calls), later.stats["reencoded"], later.stats["candidate_fresh_share"]) == (
        1,
        0.0,
        1.0,
    )
    encoder.step = 14
    expired = subject.score(14, *batch())
    np.testing.assert_allclose(expired.rewards, expected_rewards(corpus(14)), atol=1e-5)
    assert expired.stats["reencoded_total_share"] == 2.0


def test_swap_keeps_only_what_is_newer() -> None:
    encoder = Encoder(4)
    subject = environment(encoder, overlay_max_age_steps=100, refresh_budget=10)
    subject.score(4, *batch())
    encoder.step = 8
    subject.score(8, *batch())
    assert sorted(subject.state()["steps"].tolist()) == [4] * 10 + [8] * 10
    subject.swap(index(6))
    state = subject.state()
    assert set(state["steps"].tolist()) == {8}
    assert sorted(state["rows"].tolist()) == sorted(encoder.calls[1])
    encoder.step = 9
    result = subject.score(9, *batch())
    assert result.stats["index_age"] == 3.0
    mixed = corpus(6)
    mixed[encoder.calls[1]] = corpus(8)[encoder.calls[1]]
    mixed[encoder.calls[2]] = corpus(9)[encoder.calls[2]]
    np.testing.assert_allclose(result.rewards, expected_rewards(mixed), atol=1e-5)
    with pytest.raises(ValueError, match="another corpus"):
        subject.swap(ExactIndex(corpus(6), IDS[::-1], 7))


def test_state_restores_the_same_rewards() -> None:
    first = environment(Encoder(10), overlay_max_age_steps=9, refresh_budget=30)
    first.score(10, *batch())
    second = environment(Encoder(11), overlay_max_age_steps=9, refresh_budget=30)
    second.restore(first.state())
    first.encode_documents = Encoder(11)
    one, other = first.score(11, *batch(seed=5)), second.score(11, *batch(seed=5))
    np.testing.assert_array_equal(one.rewards, other.rewards)
    assert (
        one.stats["reencoded_total_share"]
        == other.stats["reencoded_total_share"]
        > one.stats["reencoded_share"]
    )
    newer = environment(Encoder(11), index_step=11)
    newer.restore(first.state())
    assert set(newer.state()["steps"].tolist()) == {11}
    with pytest.raises(ValueError, match="does not fit"):
        second.restore({**first.state(), "vectors": np.zeros((1, DIM))})


def test_empty_state_restores() -> None:
    subject = environment(Encoder(0))
    subject.restore(subject.state())
    assert subject.state()["vectors"].shape == (0, DIM)


def test_group_without_a_valid_completion_costs_nothing() -> None:
    encoder = Encoder(10)
    positives, vectors, valid = batch()
    result = environment(encoder).score(10, positives, np.full_like(vectors, np.nan), np.zeros_like(valid))
    np.testing.assert_array_equal(result.rewards, 0.0)
    np.testing.assert_array_equal(result.top_rows, -1)
    assert encoder.calls == []


def test_agreement_with_exact_search_is_measured() -> None:
    class EvenRowsOnly(ExactIndex):
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = super().search(queries, len(self.vectors))
            keep = np.argsort(rows % 2, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(scores, keep, axis=1), np.take_along_axis(rows, keep, axis=1)

    whole = environment(Encoder(0)).score(0, *batch())
    assert whole.stats["candidate_agreement"] == 1.0
    half = Environment(EvenRowsOnly(corpus(0), IDS, 0), Encoder(0), candidates=20).score(0, *batch())
    _, vectors, valid = batch()
    means = unit(np.where(valid[:, :, None], vectors, 0).sum(axis=1))
    exact = np.argsort(-(means.astype(np.float64) @ corpus(0).T), axis=1)[:, :10]
    assert half.stats["candidate_agreement"] == pytest.approx((exact % 2 == 0).mean())


@pytest.mark.parametrize("wrong", [{}, {ROWS: 1.0}, {-1: 1.0}, {3: 0.0}])
def test_bad_positives(wrong: dict[int, float]) -> None:
    _, vectors, valid = batch()
    with pytest.raises(ValueError, match="query 1"):
        environment(Encoder(0)).score(0, [{3: 1.0}, wrong, {3: 1.0}, {3: 1.0}], vectors, valid)


def test_encoder_that_breaks_is_not_believed() -> None:
    with pytest.raises(EmbeddingError, match=r"document in row \d+: its embedding holds numbers"):
        environment(lambda rows: np.full((len(rows), DIM), np.nan)).score(0, *batch())


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_completions_without_an_embedding_are_not_rewarded(value: float) -> None:
    positives, vectors, valid = batch()
    query, completion = np.argwhere(valid)[-1]
    vectors[query, completion] = value
    with pytest.raises(EmbeddingError, match=f"query {query}, completion {completion}: its embedding"):
        environment(Encoder(10)).score(0, positives, vectors, valid)
    direct = np.ones((len(vectors), DIM), np.float32)
    direct[1] = value
    with pytest.raises(EmbeddingError, match="query 1, embedded directly: its embedding"):
        environment(Encoder(10)).score(0, *batch(), direct=direct)


def test_neighbours_of_candidates_are_candidates_too() -> None:
    encoder = Encoder(10)
    positives, vectors, valid = batch()
    subject = Environment(
        index(0), encoder, candidates=4, per_completion=2, neighbours=3, refresh_budget=ROWS
    )
    subject.score(10, positives, vectors, valid)
    alone = Encoder(10)
    Environment(index(0), alone, candidates=4, per_completion=2, refresh_budget=ROWS).score(
        10, positives, vectors, valid
    )
    candidates, widened = set(alone.calls[0]), set(encoder.calls[0])
    near = np.argsort(-(corpus(0).astype(np.float64) @ corpus(0).T), axis=1)[:, :4]
    assert widened == candidates | {row for candidate in candidates for row in near[candidate].tolist()}
    assert len(widened) > len(candidates)


def test_a_neighbour_that_came_nearer_counts_once_it_is_a_candidate() -> None:
    # The second document hides behind the first until the current parameters move it on top of the query.
    query = unit(np.array([1.0, 0.2, 0.0]))
    stale = unit(np.array([[1.0, 0.0, 0.0], [0.9, -0.3, 0.0], [0.0, 0.0, 1.0]]))
    fresh = stale.copy()
    fresh[1] = query

    def score(neighbours: int) -> float:
        subject = Environment(
            ExactIndex(stale, list("abc"), 0),
            lambda rows: fresh[rows],
            candidates=1,
            per_completion=1,
            neighbours=neighbours,
        )
        return float(subject.score(3, [{0: 1.0}], query[None, None], np.ones((1, 1), bool)).rewards[0, 0])

    assert score(0) == pytest.approx(1, abs=1e-5)
    assert score(1) < 0.8


def test_what_a_period_of_the_index_costs_is_counted() -> None:
    encoder = Encoder(1)
    subject = environment(encoder, refresh_budget=12)
    shares = [subject.score(step, *batch(seed=step)).stats["reencoded_period_share"] for step in (1, 2)]
    assert shares == pytest.approx([12 / ROWS, 24 / ROWS])
    subject.swap(index(2))
    result = subject.score(3, *batch(seed=3))
    assert result.stats["reencoded_period_share"] == pytest.approx(12 / ROWS)
    assert result.stats["reencoded_total_share"] == pytest.approx(36 / ROWS)


def test_queries_are_told_apart_from_their_hardest_candidates() -> None:
    positives, vectors, valid = batch()
    result = environment(Encoder(10), candidates=6).score(10, positives, vectors, valid)
    rows = infonce_document_rows(positives, result.candidates, 12, rows=ROWS)
    # Of equal grades the first.
    assert rows[:QUERIES].tolist() == [3, 40, 99, 5]
    assert len(set(rows.tolist())) == len(rows) == QUERIES + 12
    # The other relevant ones, then what each query finds first: by brute force, of the mean of its valid
    # completions or of one of them.
    assert {17, 6} < set(rows[QUERIES:].tolist())
    for query in range(QUERIES):
        live = vectors[query][valid[query]]
        means = [*live, live.mean(axis=0)]
        nearest = {
            int(np.argmax(np.where(np.isin(range(ROWS), list(positives[query])), -2, corpus(0) @ each)))
            for each in means
        }
        assert nearest & set(rows[QUERIES:].tolist())


def test_where_candidates_are_few_the_corpus_fills_up() -> None:
    positives = [{2: 1.0}, {2: 1.0, 7: 1.0}, {0: 3.0}]
    candidates = [np.array(rows, np.int32) for rows in ([2, 9], [2, 7, 4], [0])]
    assert infonce_document_rows(positives, candidates, 0, rows=10).tolist() == [2, 2, 0]
    assert infonce_document_rows(positives, candidates, 5, rows=10).tolist() == [2, 2, 0, 9, 7, 4, 1, 3]
    # A step reads no further into the corpus than it needs to.
    assert infonce_document_rows(positives, candidates, 5, rows=10**15).tolist() == [2, 2, 0, 9, 7, 4, 1, 3]
    assert infonce_document_rows(positives, candidates, 7, rows=10).tolist()[3:] == [9, 7, 4, 1, 3, 5, 6]
    with pytest.raises(ValueError, match="a corpus of 6 documents has no 5"):
        infonce_document_rows(positives, candidates[2:], 5, rows=6)


def test_near_duplicates_of_a_positive_are_no_negatives() -> None:
    positives, vectors, valid = batch()
    documents = corpus(0)
    # An unjudged near copy of a best document, and a judged one.
    documents[50], documents[6] = (
        unit(documents[row] + 0.02 * documents[other]) for row, other in ((40, 1), (99, 2))
    )
    subject = Environment(
        ExactIndex(documents, IDS, 0), lambda rows: documents[rows], candidates=60, refresh_budget=0
    )
    found = subject.score(1, positives, vectors, valid).candidates
    assert any(50 in rows for rows in found)
    kept = drop_near_duplicates(subject.vectors_of, positives, found, max_cosine=0.5)
    judged = {row for grades in positives for row in grades}
    best = documents[[3, 40, 99, 5]].astype(np.float64)
    for ours, rows in zip(kept, found, strict=True):
        assert ours.tolist() == [
            row
            for row in rows.tolist()
            if row in judged or all(each @ documents[row] <= 0.5 for each in best)
        ]
    assert not any(50 in rows for rows in kept)
    assert any(6 in rows for rows in kept)
    assert any(len(ours) < len(rows) - 1 for ours, rows in zip(kept, found, strict=True))


@pytest.mark.parametrize("neighbours", [0, 3])
def test_a_step_asks_the_index_a_few_times_however_many_queries(neighbours: int) -> None:
    """Each time is a round trip to the devices, and to the other processes."""
    asked: list[str] = []

    class Counted(ExactIndex):
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            asked.append("search")
            return super().search(queries, k)

        def take(self, rows: np.ndarray) -> np.ndarray:
            asked.append("take")
            return super().take(rows)

    positives, vectors, valid = batch()
    subject = Environment(
        Counted(corpus(0), IDS, 0), Encoder(10), candidates=12, refresh_budget=9, neighbours=neighbours
    )
    for copies in (1, 3):
        asked.clear()
        repeated = np.concatenate([vectors] * copies), np.concatenate([valid] * copies)
        result = subject.score(10, positives * copies, *repeated)
        # One take more for the share that the index finds, where the corpus is small.
        assert sorted(asked) == ["search"] * (3 if neighbours else 2) + ["take"] * (3 if neighbours else 2)
        asked.clear()
        drop_near_duplicates(subject.vectors_of, positives * copies, result.candidates, max_cosine=0.9)
        assert asked == ["take", "take"]
