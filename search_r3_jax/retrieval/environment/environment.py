"""The environment of stage 2: proposes candidates, refreshes their vectors, rewards completions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from search_r3_jax.config import RewardConfig
from search_r3_jax.retrieval.environment.overlay import Overlay
from search_r3_jax.retrieval.environment.rewards import check_reward, reward_terms, total_reward
from search_r3_jax.retrieval.index.protocol import Index, recall_at_k
from search_r3_jax.vectors import require_directions

EncodeDocuments = Callable[[np.ndarray], np.ndarray]
TOP = 3
AGREEMENT_MAX_ROWS = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one step of the environment.

    Attributes:
      rewards: [Q,G] float32 in [0,1].
      terms: what each reward is the sum of, [Q,G] each (see `reward_terms`).
      top_rows: each completion's best documents, [Q,G,3] int32; −1 where invalid or where there are fewer.
      candidates: the rows that each query's completions were ranked among, int32: its relevant ones, then
          those proposed, best first.
      stats: named floats to log.
    """

    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    top_rows: np.ndarray
    candidates: list[np.ndarray]
    stats: dict[str, float]


class Environment:
    """Proposes candidates from a stale index, and ranks them by fresh vectors where there are any."""

    def __init__(
        self,
        index: Index,
        encode_documents: EncodeDocuments,
        *,
        candidates: int = 64,
        per_completion: int = 8,
        refresh_budget: int = 1024,
        overlay_max_age_steps: int = 0,
        neighbours: int = 0,
        reward: RewardConfig | None = None,
        max_tokens: int = 0,
    ) -> None:
        """`encode_documents` maps distinct rows [n] int32 to unit vectors [n,E] of the current parameters.

        A query has at most `candidates` beside its positives, `per_completion` of them from the search of
        each completion. Each candidate adds its `neighbours` nearest in the index: a document near it may
        have moved closer to the query. At most `refresh_budget` documents are encoded a step; 0 ranks by the
        index alone. The overlay keeps vectors for `overlay_max_age_steps`; 0 keeps them for one step.
        """
        if candidates < 1 or per_completion < 1 or min(refresh_budget, overlay_max_age_steps, neighbours) < 0:
            raise ValueError(
                "candidates and per_completion must be at least 1, refresh_budget, overlay_max_age_steps and "
                "neighbours at least 0"
            )
        self.index = index
        self.encode_documents = encode_documents
        self._candidates = candidates
        self._per_completion = per_completion
        self._refresh_budget = refresh_budget
        self._neighbours = neighbours
        self._reward, self._max_tokens = reward or RewardConfig(), max_tokens
        check_reward(self._reward, max_tokens=max_tokens)
        self._overlay = Overlay(max_age=overlay_max_age_steps)
        self._reencoded_total = self._reencoded_before_swap = 0

    def score(
        self,
        step: int,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        *,
        tokens: np.ndarray | None = None,
        direct: np.ndarray | None = None,
    ) -> StepResult:
        """Reward Q groups of G completions of policy `step`.

        `positives` maps row → grade > 0 for each query; the vectors are unit vectors [Q,G,E]; `valid` is
        [Q,G] bool. `tokens` [Q,G] of each reply, where length has a weight; `direct` [Q,E], the queries
        embedded without reasoning, for the reward `gain_over_direct`. Raises EmbeddingError naming the first
        of these, or document, whose vector is not finite or zero.
        """
        self._check(positives, vectors, valid, direct)
        # Vectors of invalid completions may hold anything: they must not enter a sum.
        vectors = np.where(valid[:, :, None], vectors, 0).astype(np.float32)
        self._overlay.expire(step)

        started = time.perf_counter()
        means = _unit_means(vectors, valid)
        candidates, agreement = self._propose(positives, vectors, valid, means)
        proposed = time.perf_counter()
        rows = np.unique(np.concatenate(candidates))
        documents = _Documents(rows, self.vectors_of(rows))
        reencoded = self._refresh(step, positives, vectors, valid, candidates, documents)
        refreshed = time.perf_counter()
        rewards, terms, top_rows, fresh_share = self._rank(
            positives, vectors, valid, candidates, documents, tokens, direct
        )
        rewarded = time.perf_counter()

        corpus = self.index.shape[0]
        stats = {
            "index_step": float(self.index.version),
            "policy_step": float(step),
            "index_age": float(step - self.index.version),
            "reencoded": float(reencoded),
            "reencoded_share": reencoded / corpus,
            "reencoded_period_share": (self._reencoded_total - self._reencoded_before_swap) / corpus,
            "reencoded_total_share": self._reencoded_total / corpus,
            "overlay_size": float(len(self._overlay)),
            "candidate_fresh_share": fresh_share,
            "propose_seconds": proposed - started,
            "refresh_seconds": refreshed - proposed,
            "reward_seconds": rewarded - refreshed,
            **agreement,
        }
        return StepResult(rewards=rewards, terms=terms, top_rows=top_rows, candidates=candidates, stats=stats)

    def swap(self, index: Index) -> None:
        """Switch to a newer index, between steps; drops overlay vectors older than it.

        Raises ValueError on another corpus.
        """
        if index.ids_hash != self.index.ids_hash or index.shape != self.index.shape:
            raise ValueError(
                f"index v{index.version} is of another corpus or width than v{self.index.version}"
            )
        self.index = index
        self._overlay.keep_from(index.version)
        self._reencoded_before_swap = self._reencoded_total

    def forget(self, rows: np.ndarray) -> None:
        """Drop the overlay's vectors of rows [n], of which the index has fresher ones."""
        self._overlay.forget(rows)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: the overlay, and the counters of re-encoded documents.

        See `Overlay.state`; the counters are `reencoded_total` [] and `reencoded_before_swap` [].
        """
        counts = {
            "reencoded_total": self._reencoded_total,
            "reencoded_before_swap": self._reencoded_before_swap,
        }
        return {
            **self._overlay.state(self.index.shape[1]),
            **{name: np.array(count, np.int64) for name, count in counts.items()},
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Resume from the arrays of `state`, without vectors older than the present index.

        Raises ValueError on another corpus.
        """
        self._overlay.restore(state, self.index)
        self._reencoded_total, self._reencoded_before_swap = (
            int(state["reencoded_total"]),
            int(state["reencoded_before_swap"]),
        )

    def _propose(
        self,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        means: np.ndarray,
    ) -> tuple[list[np.ndarray], dict[str, float]]:
        """Candidate rows of each query, positives first, and the recall of the proposal."""
        _, mean_rows = self.index.search(means, self._candidates)
        _, flat_rows = self.index.search(vectors[valid], self._per_completion)
        owners = np.nonzero(valid)[0]
        candidates = []
        for query in range(len(positives)):
            # Rank by rank, so that the cap cuts the list of every completion at the same depth.
            by_completion = flat_rows[owners == query].T.ravel()
            proposed = (
                _distinct(np.concatenate([by_completion, mean_rows[query]]))[: self._candidates]
                if len(by_completion)
                else by_completion
            )
            candidates.append(
                _distinct(np.concatenate([np.array(list(positives[query]), np.int32), proposed]))
            )
        if self._neighbours:
            candidates = self._widened(candidates)
        live = valid.any(axis=1)
        return candidates, self._agreement(means[live], mean_rows[live])

    def _widened(self, candidates: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each query's candidates, then their nearest documents."""
        rows = _distinct(np.concatenate(candidates))
        # One more, because a document is nearest to itself.
        _, nearest = self.index.search(self.vectors_of(rows), self._neighbours + 1)
        place = {row: i for i, row in enumerate(rows.tolist())}
        return [
            _distinct(np.concatenate([rows, nearest[[place[row] for row in rows.tolist()]].T.ravel()]))
            for rows in candidates
        ]

    def _agreement(self, means: np.ndarray, proposed: np.ndarray) -> dict[str, float]:
        """Share of the exact top 10 that the index finds.

        Empty where the corpus is too large for an exact search every step.
        """
        if len(means) == 0 or self.index.shape[0] > AGREEMENT_MAX_ROWS:
            return {}
        k = min(10, proposed.shape[1])
        exact = np.argsort(
            -(means @ self.index.take(np.arange(self.index.shape[0])).T), axis=1, kind="stable"
        )
        return {"candidate_agreement": recall_at_k(proposed, exact, min(k, exact.shape[1]))}

    def _refresh(
        self,
        step: int,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        candidates: Sequence[np.ndarray],
        documents: _Documents,
    ) -> int:
        """Encode candidates without a fresh vector, in `documents` too; returns how many.

        Positives come first, then the candidates by their best score.
        """
        if self._refresh_budget == 0:
            return 0
        priority: dict[int, float] = {}
        for query in np.flatnonzero(valid.any(axis=1)).tolist():
            best = (vectors[query][valid[query]] @ documents.of(candidates[query]).T).max(axis=0)
            for row, score in zip(candidates[query].tolist(), best.tolist(), strict=True):
                if row not in self._overlay:
                    priority[row] = max(
                        priority.get(row, -np.inf), np.inf if row in positives[query] else score
                    )
        # Ties by row: the choice must not depend on the order of queries.
        chosen = sorted(priority, key=lambda row: (-priority[row], row))[: self._refresh_budget]
        if not chosen:
            return 0
        fresh = np.asarray(self.encode_documents(np.array(chosen, dtype=np.int32)), dtype=np.float32)
        if fresh.shape != (len(chosen), vectors.shape[2]):
            raise ValueError(f"encode_documents returned {fresh.shape} for {len(chosen)} rows")
        require_directions(fresh, lambda at: f"document in row {chosen[at]}")
        self._overlay.put(step, chosen, fresh)
        documents.replace(np.array(chosen), fresh)
        self._reencoded_total += len(chosen)
        return len(chosen)

    def _rank(
        self,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        candidates: Sequence[np.ndarray],
        documents: _Documents,
        tokens: np.ndarray | None,
        direct: np.ndarray | None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, float]:
        """Rewards [Q,G], their terms, top rows [Q,G,3] and the share of candidates with a fresh vector."""
        rewards = np.zeros(valid.shape, dtype=np.float32)
        of_query: list[dict[str, np.ndarray]] = []
        top_rows = np.full((*valid.shape, TOP), -1, dtype=np.int32)
        for query, rows in enumerate(candidates):
            own = documents.of(rows)
            similarities = vectors[query] @ own.T
            relevance = np.array([positives[query].get(row, 0.0) for row in rows.tolist()])
            terms = reward_terms(
                similarities,
                relevance,
                valid[query],
                self._reward,
                tokens=None if tokens is None else tokens[query],
                max_tokens=self._max_tokens,
                direct_similarities=None if direct is None else direct[query] @ own.T,
            )
            rewards[query] = total_reward(terms)
            of_query.append(terms)
            best = rows[np.argsort(-similarities, axis=1, kind="stable")[:, :TOP]]
            top_rows[query, :, : best.shape[1]] = np.where(valid[query][:, None], best, -1)
        fresh = [row in self._overlay for rows in candidates for row in rows.tolist()]
        all_terms = {name: np.stack([terms[name] for terms in of_query]) for name in of_query[0]}
        return rewards, all_terms, top_rows, sum(fresh) / len(fresh)

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] that ranking uses: the overlay's where there is one, the index's otherwise."""
        return self._overlay.over(self.index, rows)

    def _check(
        self,
        positives: Sequence[Mapping[int, float]],
        vectors: np.ndarray,
        valid: np.ndarray,
        direct: np.ndarray | None,
    ) -> None:
        rows, dim = self.index.shape
        if (
            vectors.ndim != 3
            or vectors.shape[2] != dim
            or valid.shape != vectors.shape[:2]
            or len(positives) != len(vectors)
        ):
            raise ValueError(
                f"{len(positives)} queries, vectors {vectors.shape}, valid {valid.shape}: want Q, "
                f"[Q,G,{dim}], [Q,G]"
            )
        # Invalid completions may hold anything.
        live = np.argwhere(valid)
        require_directions(vectors[valid], lambda at: "query {}, completion {}".format(*live[at].tolist()))
        if direct is not None:
            require_directions(direct, lambda at: f"query {at}, embedded directly")
        for query, grades in enumerate(positives):
            if not grades or any(not 0 <= row < rows or grade <= 0 for row, grade in grades.items()):
                raise ValueError(
                    f"query {query}: positives {dict(grades)} must be rows below {rows} with grades above 0, "
                    "at least one"
                )


class _Documents:
    """The vectors of a step's candidates, taken from the index at once: each time costs a round trip."""

    def __init__(self, rows: np.ndarray, vectors: np.ndarray):
        """`rows` [n] ascending, their `vectors` [n,E]."""
        self._rows, self._vectors = rows, vectors

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [m,E] of some of the rows."""
        return self._vectors[np.searchsorted(self._rows, rows)]

    def replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Put fresher vectors [m,E] in the place of these rows'."""
        self._vectors[np.searchsorted(self._rows, rows)] = vectors


def _unit_means(vectors: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Unit mean [Q,E] of each group's valid vectors [Q,G,E]; zero where there is none."""
    sums = np.where(valid[:, :, None], vectors, 0).sum(axis=1)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _distinct(rows: np.ndarray) -> np.ndarray:
    """The distinct rows ≥ 0, in order of first appearance, int32."""
    return np.array(list(dict.fromkeys(rows[rows >= 0].tolist())), dtype=np.int32)
