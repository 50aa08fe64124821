"""Evaluates one model on one collection, direct and reasoned, by exact search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flax import nnx

from search_r3_jax.config import SamplerConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.evaluation.metrics import Metrics, Run, evaluate_run, run_from_scores
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.retrieval.exact import ExactIndex
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.prompts import Prompter

QUERIES_A_PASS = 128
DEPTH = 100


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """One mode on one collection.

    Attributes:
        metrics: means over the queries.
        of_query: each query's metrics.
        run: each query's ranked documents.
        valid_rate: share of queries whose reasoning ended with an embed token of its own; 1 in direct mode.
        reply_tokens: tokens written a query on average.
        queries_per_second: the cost of embedding the queries.
        thoughts: what was written for each query; empty in direct mode.
    """

    metrics: Metrics
    of_query: dict[str, Metrics]
    run: Run
    valid_rate: float
    reply_tokens: float
    queries_per_second: float
    thoughts: list[str]

    def as_dict(self) -> dict[str, float]:
        """The numbers that a table shows."""
        return {
            **self.metrics.as_dict(),
            "valid_rate": self.valid_rate,
            "reply_tokens": self.reply_tokens,
            "queries_per_second": self.queries_per_second,
        }


class Evaluator:
    """Compiled once, then fed with any parameters of the same structure."""

    def __init__(self, graph: nnx.GraphDef[Decoder], prompter: Prompter, text: TextConfig, sampler: SamplerConfig):
        self._encoder = Encoder(graph, prompter)
        # Greedy: an evaluation must not depend on a seed.
        self._sampler = Sampler(
            graph, prompter, max_think_tokens=sampler.max_think_tokens, temperature=0.0, prefill_chunk=sampler.prefill_chunk
        )
        self._prompter, self._text = prompter, text

    def documents(self, state: nnx.State, collection: Collection, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Vectors [N,E] of the corpus."""
        texts = [document.body for document in collection.documents]
        return self._encoder.encode(state, texts, max_tokens=self._text.max_document_tokens, on_progress=on_progress)

    def direct(self, state: nnx.State, collection: Collection, documents_ne: np.ndarray) -> ModeResult:
        """Queries embedded without reasoning; `documents_ne` are the vectors of the collection's corpus."""
        started = time.perf_counter()
        texts = [query.text for query in collection.queries]
        vectors = self._encoder.encode(state, texts, max_tokens=self._text.max_query_tokens)
        rate = len(texts) / (time.perf_counter() - started)
        tokens = float(len(self._prompter.direct.closing))
        return _result(collection, documents_ne, vectors, np.ones(len(texts), bool), tokens, rate, [])

    def reason(
        self,
        state: nnx.State,
        collection: Collection,
        documents_ne: np.ndarray,
        on_progress: Callable[[int], object] | None = None,
    ) -> ModeResult:
        """Queries embedded after greedy reasoning; where the embed token did not come in time it was forced, and counts as not valid."""
        started = time.perf_counter()
        texts = [query.text for query in collection.queries]
        # Sorted by length, so that a pass holds prompts of one bucket.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: dict[int, np.ndarray] = {}
        valid, lengths, thoughts = np.zeros(len(texts), bool), np.zeros(len(texts)), [""] * len(texts)
        for start in range(0, len(order), QUERIES_A_PASS):
            rows = order[start : start + QUERIES_A_PASS]
            filled = rows + rows[:1] * (QUERIES_A_PASS - len(rows))
            seeds = np.zeros((len(filled), 1), np.uint32)
            rollout = self._sampler.sample(state, [texts[i] for i in filled], seeds, max_tokens=self._text.max_query_tokens)
            for at, (i, reply) in enumerate(zip(rows, rollout.replies(), strict=False)):
                vectors[i], valid[i], lengths[i] = rollout.vectors[at], rollout.valid[at], rollout.lengths[at]
                thoughts[i] = str(self._prompter.tokenizer.decode(reply))
            if on_progress is not None:
                on_progress(len(rows))
        rate = len(texts) / (time.perf_counter() - started)
        stacked = np.stack([vectors[i] for i in range(len(texts))])
        return _result(collection, documents_ne, stacked, valid, float(lengths.mean()), rate, thoughts)


def _result(
    collection: Collection,
    documents_ne: np.ndarray,
    queries_qe: np.ndarray,
    valid: np.ndarray,
    tokens: float,
    rate: float,
    thoughts: list[str],
) -> ModeResult:
    doc_ids = [document.doc_id for document in collection.documents]
    scores, rows = ExactIndex(documents_ne, doc_ids, 0).search(queries_qe, min(DEPTH, len(doc_ids)))
    run = run_from_scores([query.query_id for query in collection.queries], doc_ids, scores, rows)
    metrics, of_query = evaluate_run(collection.qrels(), run)
    return ModeResult(
        metrics=metrics,
        of_query=of_query,
        run=run,
        valid_rate=float(valid.mean()),
        reply_tokens=tokens,
        queries_per_second=rate,
        thoughts=thoughts,
    )
