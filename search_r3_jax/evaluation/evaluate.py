"""Evaluation of one model on one collection, direct and reasoned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.config import SamplerConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.evaluation.controls import CONTROLS, control_replies, corpus_words
from search_r3_jax.evaluation.metrics import (
    Metrics,
    Run,
    evaluate_run,
    run_from_scores,
    without_identical_ids,
)
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.profiling import ENCODE, step
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import LocalIndex
from search_r3_jax.rollout.encoder import Encoder, ReasonedEncoder
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.vectors import require_directions

QUERIES_PER_PASS = 128
# Rows per pass are a multiple of this, so that similar numbers of queries share a program.
PASS_MULTIPLE = 8
DEPTH = 100
OnProgress = Callable[[int], object]
QueryMode = Literal["direct", "reason", "average"]
"""How a query is embedded: by a prompt's mode, or as the mean of both."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedQueries:
    """The embedded queries of a collection, in its order.

    Attributes:
        vectors: [Q,E] float32 of unit norm.
        seconds: wall time of embedding, compiling included.
        warm_seconds: the same without compiling.
        valid: [Q] whether the model wrote the embed token itself; empty without reasoning.
        tokens: [Q] tokens of each reply; empty without replies.
        thoughts: the reasoning alone of each query as text; empty without reasoning.
        replies: token ids of the replies, embed token included.
    """

    vectors: np.ndarray
    seconds: float
    warm_seconds: float
    valid: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """Result of one mode on one collection.

    Attributes:
        metrics: means over the queries.
        of_query: each query's metrics.
        run: each query's ranked documents.
        queries_per_second: the cost of the queries; compiling is part of it.
        milliseconds_per_query: wall time of embedding them over their number, without compiling.
        valid, tokens, thoughts: of each query, as in `EmbeddedQueries`.
    """

    metrics: Metrics
    of_query: dict[str, Metrics]
    run: Run
    queries_per_second: float
    milliseconds_per_query: float
    valid: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    @property
    def valid_rate(self) -> float:
        """Share of queries whose embed token the model wrote itself; 1 without reasoning."""
        return float(np.mean(self.valid)) if self.valid else 1.0

    @property
    def reply_tokens(self) -> float:
        """Mean number of tokens per reply; 0 without replies."""
        return float(np.mean(self.tokens)) if self.tokens else 0.0

    def as_dict(self) -> dict[str, float]:
        """The numbers shown in a table."""
        return {
            **self.metrics.as_dict(),
            "valid_rate": self.valid_rate,
            "reply_tokens": self.reply_tokens,
            "queries_per_second": self.queries_per_second,
            "milliseconds_per_query": self.milliseconds_per_query,
        }


class Evaluator:
    """Evaluates parameters of one structure; programs are compiled once."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        text: TextConfig,
        sampler: SamplerConfig,
        *,
        mesh: Mesh | None = None,
    ):
        """On a `mesh`, every process computes the whole result."""
        self._encoder, self._reasoned_encoder = (
            Encoder(graph, prompter, mesh=mesh),
            ReasonedEncoder(graph, prompter, mesh=mesh),
        )
        # Greedy: an evaluation must not depend on a seed.
        self._sampler = Sampler(
            graph,
            prompter,
            dataclasses.replace(sampler, temperature=0.0, top_k=0, top_p=1.0),
            mesh=mesh,
        )
        self._prompter, self._text = prompter, text

    def documents(
        self, state: nnx.State, collection: Collection, on_progress: OnProgress | None = None
    ) -> np.ndarray:
        """Vectors [N,E] of the corpus."""
        return self.document_texts(
            state, [document.body for document in collection.documents], on_progress=on_progress
        )

    def document_texts(
        self, state: nnx.State, texts: Sequence[str], *, on_progress: OnProgress | None = None
    ) -> np.ndarray:
        """Vectors [N,E] of bodies of documents."""
        return self._encoder.encode(
            state, texts, max_tokens=self._text.max_document_tokens, on_progress=on_progress
        )

    def encoding_rate(self) -> dict[str, float]:
        """Tokens a second, in all and a chip, and `mfu` where known, of what was encoded directly so far."""
        return self._encoder.rate()

    def direct(self, state: nnx.State, collection: Collection, documents_ne: np.ndarray) -> ModeResult:
        """Search with queries embedded without reasoning, over the corpus vectors `documents_ne`, exactly."""
        return search_result(
            collection, exact_index(collection, documents_ne), self.direct_queries(state, collection)
        )

    def reason(
        self,
        state: nnx.State,
        collection: Collection,
        documents_ne: np.ndarray,
        on_progress: OnProgress | None = None,
    ) -> ModeResult:
        """Search with queries embedded after greedy reasoning, over `documents_ne`, exactly."""
        return search_result(
            collection,
            exact_index(collection, documents_ne),
            self.reasoned_queries(state, collection, on_progress),
        )

    def direct_queries(
        self, state: nnx.State, collection: Collection, on_progress: OnProgress | None = None
    ) -> EmbeddedQueries:
        """Embed the queries without reasoning; their reply is the closing."""
        started = time.perf_counter()
        texts = [query.body for query in collection.queries]
        self._encoder.compile(state, texts, max_tokens=self._text.max_query_tokens)
        compiled = time.perf_counter()
        vectors = self._encoder.encode(
            state, texts, max_tokens=self._text.max_query_tokens, on_progress=on_progress
        )
        ended = time.perf_counter()
        tokens = [len(self._prompter.direct.closing)] * len(texts)
        return EmbeddedQueries(
            vectors=vectors,
            seconds=ended - started,
            warm_seconds=ended - compiled,
            valid=[True] * len(texts),
            tokens=tokens,
        )

    def reasoned_queries(
        self, state: nnx.State, collection: Collection, on_progress: OnProgress | None = None
    ) -> EmbeddedQueries:
        """Embed the queries after greedy reasoning.

        A query whose embed token was forced at the limit counts as not valid.
        """
        started = time.perf_counter()
        texts = [query.body for query in collection.queries]
        # Sorted by length, so that a pass holds prompts of one bucket.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: dict[int, np.ndarray] = {}
        valid, replies = [False] * len(texts), [[0]] * len(texts)
        width = rows_per_pass(len(texts))
        self._sampler.compile(state, width, 1, max_tokens=self._text.max_query_tokens)
        compiled = time.perf_counter()
        for start in range(0, len(order), width):
            rows = order[start : start + width]
            filled = rows + rows[:1] * (width - len(rows))
            seeds = np.zeros((len(filled), 1), np.uint32)
            with step(ENCODE):
                rollout = self._sampler.sample(
                    state, [texts[i] for i in filled], seeds, max_tokens=self._text.max_query_tokens
                )
            for at, (i, reply) in enumerate(zip(rows, rollout.replies(), strict=False)):
                vectors[i], valid[i], replies[i] = rollout.vectors[at], bool(rollout.valid[at]), reply
            if on_progress is not None:
                on_progress(len(rows))
        ended = time.perf_counter()
        return EmbeddedQueries(
            vectors=np.stack([vectors[i] for i in range(len(texts))]),
            seconds=ended - started,
            warm_seconds=ended - compiled,
            valid=valid,
            tokens=[len(reply) for reply in replies],
            thoughts=[self._prompter.thought_text(reply) for reply in replies],
            replies=replies,
        )

    def control_queries(
        self,
        state: nnx.State,
        collection: Collection,
        reasoned: EmbeddedQueries,
        *,
        seed: int,
        names: Iterable[str] = tuple(CONTROLS),
        on_progress: OnProgress | None = None,
    ) -> dict[str, EmbeddedQueries]:
        """Embed the queries with each control of `names` (of `CONTROLS`) in place of their reasoning.

        Raises ValueError for a single query.
        """
        texts, max_tokens = [query.body for query in collection.queries], self._text.max_query_tokens
        of_control = control_replies(
            self._prompter, texts, reasoned.replies, corpus_words(collection), seed=seed
        )
        results: dict[str, EmbeddedQueries] = {}
        for name in names:
            replies = of_control[name]
            started = time.perf_counter()
            self._reasoned_encoder.compile(state, texts, replies, max_tokens=max_tokens)
            compiled = time.perf_counter()
            vectors = self._reasoned_encoder.encode(
                state, texts, replies, max_tokens=max_tokens, on_progress=on_progress
            )
            ended = time.perf_counter()
            tokens = [len(reply) for reply in replies]
            results[name] = EmbeddedQueries(
                vectors=vectors, seconds=ended - started, warm_seconds=ended - compiled, tokens=tokens
            )
        return results


def average_queries(direct: EmbeddedQueries, reasoned: EmbeddedQueries) -> EmbeddedQueries:
    """The unit mean of a query's direct and reasoned vectors; costs are summed."""
    sums = direct.vectors + reasoned.vectors
    return EmbeddedQueries(
        # Opposite vectors leave zero, which the search refuses.
        vectors=sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), 1e-12),
        seconds=direct.seconds + reasoned.seconds,
        warm_seconds=direct.warm_seconds + reasoned.warm_seconds,
        valid=reasoned.valid,
        tokens=[both[0] + both[1] for both in zip(direct.tokens, reasoned.tokens, strict=True)],
        thoughts=reasoned.thoughts,
        replies=reasoned.replies,
    )


def rows_per_pass(queries: int) -> int:
    """Rows per pass of the sampler: about `QUERIES_PER_PASS`, chosen so that all passes are nearly full."""
    passes = -(-queries // QUERIES_PER_PASS)
    return -(-queries // (passes * PASS_MULTIPLE)) * PASS_MULTIPLE


def exact_index(collection: Collection, documents_ne: np.ndarray) -> LocalIndex:
    """Exact search over the vectors of a collection's corpus."""
    return ExactIndex(documents_ne, collection.document_ids, 0)


def search_depth(collection: Collection) -> int:
    """Documents to search for, so that `DEPTH` are left where one is left out."""
    return DEPTH + collection.ignore_identical_ids


def search_result(collection: Collection, index: LocalIndex, queries: EmbeddedQueries) -> ModeResult:
    """Search the `DEPTH` best documents of each query and evaluate them.

    Raises UserError naming the first query whose vector is not finite or zero.
    """
    require_directions(queries.vectors, lambda row: f"query {collection.queries[row].query_id}")
    scores, rows = index.search(queries.vectors, min(search_depth(collection), len(index.ids)))
    run = run_from_scores([query.query_id for query in collection.queries], index.ids, scores, rows)
    if collection.ignore_identical_ids:
        run = without_identical_ids(run, depth=DEPTH)
    metrics, of_query = evaluate_run(collection.qrels(), run)
    return ModeResult(
        metrics=metrics,
        of_query=of_query,
        run=run,
        queries_per_second=len(collection.queries) / queries.seconds,
        milliseconds_per_query=1000 * queries.warm_seconds / len(collection.queries),
        valid=queries.valid,
        tokens=queries.tokens,
        thoughts=queries.thoughts,
    )
