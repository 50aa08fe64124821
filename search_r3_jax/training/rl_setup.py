"""Builds the programs of stage 2 before its first step, and checks the settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.config import RunConfig, check_ranges
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.known_relevance import known_rows
from search_r3_jax.errors import EmbeddingError, StoppedError, TransientError, UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.retrieval.environment.rewards import check_candidates, check_reward
from search_r3_jax.retrieval.index.scann import scann_available
from search_r3_jax.rollout.encoder import Encoder, ReasonedEncoder
from search_r3_jax.rollout.sampler import RunningRollout, Sampler
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.development import Development
from search_r3_jax.training.index_state import IndexedCorpus
from search_r3_jax.training.optimizer import learning_rates, make_optimizer
from search_r3_jax.training.rl_step import Scorer, Update, make_scorer, make_update
from search_r3_jax.training.state import TrainState, committed, init_state, state_shardings


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A step's replies, which the devices may still be writing.

    Attributes:
        rows: its queries, by their rows in the collection.
        began: when the devices could begin, on the clock of `time.perf_counter`.
        ended: gets the time at which they have ended, on that clock.
    """

    step: int
    rows: Sequence[int]
    rollout: RunningRollout
    began: float
    ended: Future[float]


@dataclass(kw_only=True)
class RlStage:
    """The programs and the data of stage 2.

    Attributes:
        start: trainable parameters that stage 2 starts from: the reference of the KL under full fine-tuning.
        frozen: the other parameters.
        current: all parameters as they are now, which `encode_documents` uses.
        log_probs: log-probabilities of a batch's replies under given parameters.
        update: one update on a batch.
        development: evaluation on the development queries; None where there are none.
        rates: the learning rate of each update.
        sampling: the rollout of the next step, where it is dispatched or read from a checkpoint.
    """

    config: RunConfig
    collection: Collection
    model: LoadedModel
    prompter: Prompter
    start: nnx.State
    frozen: nnx.State
    current: nnx.State
    sampler: Sampler
    encoder: Encoder
    reasoned_encoder: ReasonedEncoder
    log_probs: Scorer
    update: Update
    development: Development | None
    rates: np.ndarray
    sampling: Sampling | None = None

    @cached_property
    def known(self) -> tuple[dict[int, int], ...]:
        """Each query's relevant documents: row → grade, copies and those of queries of the same text too."""
        return known_rows(self.collection)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of training."""
        return self.model.mesh

    @contextmanager
    def sampling_dropped(self) -> Iterator[None]:
        """When training ends early, wait for the rollout that is begun: none may leave the others in it."""
        try:
            yield
        except (UserError, TransientError, StoppedError):
            if self.sampling is not None:
                self.sampling.ended.result()
            self.sampling = None
            raise

    def merged(self, params: nnx.State) -> nnx.State:
        """All parameters of the decoder, given the trainable ones."""
        return nnx.merge_state(params, self.frozen)

    def encode_queries(self, texts: Sequence[str], params: nnx.State | None = None) -> np.ndarray:
        """Direct embeddings [N,E] of queries, under the current parameters or `params`."""
        params = self.current if params is None else params
        return self.encoder.encode(params, texts, max_tokens=self.config.text.max_query_tokens)

    def indexed_corpus(self) -> IndexedCorpus:
        """The corpus as the index is told of it."""
        return IndexedCorpus(
            config=self.config,
            collection=self.collection,
            encode=self.encode_documents,
            encode_with=lambda params, rows: self._encode_rows(self.merged(params), rows),
            trainable=self.start,
            embed_id=self.model.embed_id,
            dim=self.model.decoder.config.hidden_size,
        )

    def encode_documents(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [n,E] of corpus rows [n] under the current parameters."""
        return self._encode_rows(self.current, rows)

    def _encode_rows(self, params: nnx.State, rows: np.ndarray) -> np.ndarray:
        bodies = [document.body for document in self.collection.documents_at(rows.tolist())]
        return self.encoder.encode(params, bodies, max_tokens=self.config.text.max_document_tokens)


def make_stage(config: RunConfig, data: TrainingSet, model: LoadedModel) -> tuple[RlStage, TrainState]:
    """Build programs and initial state of stage 2.

    Raises UserError where the model's embeddings are not finite.
    """
    rl = config.rl
    prompter = model.prompter()
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    params, frozen = committed(params), committed(frozen)
    full_graph = nnx.split(model.decoder)[0]
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.inner_epochs)
    # As in stage 1: on a CPU, Orbax writes from the arrays' memory in the background.
    donate = jax.default_backend() != "cpu"
    shardings = None if model.mesh is None else state_shardings(params, optimizer, model.mesh)
    state = init_state(params, optimizer, shardings, copy=donate)
    stage = RlStage(
        config=config,
        collection=data.train,
        model=model,
        prompter=prompter,
        start=params,
        frozen=frozen,
        current=nnx.merge_state(state.params, frozen),
        sampler=Sampler(full_graph, prompter, rl.sampler, mesh=model.mesh),
        encoder=Encoder(full_graph, prompter, mesh=model.mesh),
        reasoned_encoder=ReasonedEncoder(full_graph, prompter, mesh=model.mesh),
        log_probs=make_scorer(graph, prompter, rl, shardings),
        update=make_update(graph, prompter, optimizer, rl, shardings, donate=donate),
        development=_make_development(config, data, full_graph, prompter, model.mesh),
        rates=learning_rates(rl.optimizer, rl.steps * rl.inner_epochs),
    )
    try:
        stage.encode_queries([data.train.queries[0].body])
    except EmbeddingError:
        raise UserError(
            f"model: {config.model}: its embeddings are not finite, nor would any reward be; start from "
            "another checkpoint"
        ) from None
    return stage, state


def check_settings(config: RunConfig, collection: Collection) -> None:
    """Raise UserError where the settings are out of range, or do not fit each other or the data."""
    check_ranges(config, "rl")
    rl, index = config.rl, config.index
    check_candidates(documents=len(collection.documents), candidates=index.candidates)
    if rl.micro_queries and rl.global_queries % rl.micro_queries:
        raise UserError(
            f"rl.micro_queries: {rl.micro_queries}: does not divide rl.global_queries {rl.global_queries}; 0 "
            "is all at once"
        )
    if rl.global_queries > len(collection.queries):
        raise UserError(
            f"rl.global_queries: {rl.global_queries}: there are {len(collection.queries)} queries to train "
            "on; give 1 to that many"
        )
    if index.kind == "scann" and index.local and not scann_available():
        raise UserError(
            "index.kind: scann: is not installed here, where the indexer runs; pip install scann (Linux "
            "only), or give exact"
        )
    if rl.off_policy_steps and not rl.importance_cap:
        raise UserError(
            "rl.importance_cap: 0: with rl.off_policy_steps 1 other parameters draw the replies than are "
            "updated; give a cap, such as 2"
        )
    most = len(collection.documents) - rl.global_queries
    if rl.infonce.negatives > most:
        raise UserError(
            f"rl.infonce.negatives: {rl.infonce.negatives}: the corpus has {len(collection.documents)} "
            f"documents, {rl.global_queries} of"
            f" them the queries' own; give 0 to {most}"
        )
    if rl.min_tokens > rl.sampler.max_think_tokens:
        raise UserError(
            f"rl.min_tokens: {rl.min_tokens}: at most rl.sampler.max_think_tokens "
            f"{rl.sampler.max_think_tokens} are written; give fewer"
        )
    for query in collection.queries:
        if not query.text.strip():
            raise UserError(
                f"{collection.name}: query {query.query_id!r}: is empty; remove it from the data set"
            )
        if not query.positives:
            raise UserError(
                f"{collection.name}: query {query.query_id!r}: has no relevant document, so no reward; "
                "remove it"
            )
    check_reward(rl.reward, max_tokens=rl.sampler.max_think_tokens)


def _make_development(
    config: RunConfig,
    data: TrainingSet,
    graph: nnx.GraphDef[Decoder],
    prompter: Prompter,
    mesh: Mesh | None,
) -> Development | None:
    if data.dev is None or config.rl.eval_every == 0:
        return None
    return Development(config, [data.dev], graph, prompter, reasoned=True, probe=True, mesh=mesh)
