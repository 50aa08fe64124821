"""The acts of a step of stage 2: sample replies, score them, update the policy."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import RlConfig, RunConfig
from search_r3_jax.data.collection import Query
from search_r3_jax.data.mixture import shuffled
from search_r3_jax.distributed.lockstep import Message
from search_r3_jax.files import digest_of
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.retrieval.environment.environment import Environment, StepResult
from search_r3_jax.retrieval.environment.negatives import drop_near_duplicates, infonce_document_rows
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Rollout, RunningRollout, rollout_seeds
from search_r3_jax.rollout.sampling_program import Replies
from search_r3_jax.training.led_index import LedIndex, result_message, result_of
from search_r3_jax.training.optimizer import updates_made
from search_r3_jax.training.rl_report import step_scalars
from search_r3_jax.training.rl_setup import RlStage, Sampling
from search_r3_jax.training.rl_step import RlBatch, make_batch, put_batch, tokenize_documents
from search_r3_jax.training.state import TrainState

_PENDING = "pending "


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A step's queries and the replies to them.

    Attributes:
        positives: each query's relevant documents, row → grade.
        seconds: the devices took for them.
        waited: seconds of these that the host waited.
    """

    queries: list[Query]
    positives: list[Mapping[int, int]]
    rollout: Rollout
    seconds: float
    waited: float

    @property
    def texts(self) -> list[str]:
        """The queries' texts, with their instructions."""
        return [query.body for query in self.queries]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the replies earned, and what InfoNCE contrasts their queries with.

    Attributes:
        advantages: [B] float32.
        rows: [P] int32 of the corpus.
        documents: their unit vectors [P,E] float32.
        seconds: it took.
    """

    result: StepResult
    advantages: np.ndarray
    rows: np.ndarray
    documents: np.ndarray
    seconds: float


def sample(stage: RlStage, step: int) -> Sampled:
    """G replies to each of Q queries; the step before may have begun them.

    They are of the current parameters, or with `rl.off_policy_steps` of those that the step before began
    with; the next replies are then dispatched here, so that the devices write them while these are rewarded.
    """
    started = time.perf_counter()
    rl, collection, sampling = stage.config.rl, stage.collection, stage.sampling
    stage.sampling = None
    if sampling is None:
        sampling = _start_sampling(stage, step, started)
    assert sampling.step == step
    rollout = sampling.rollout.result()
    rows = sampling.rows
    if rl.off_policy_steps and step + 1 < rl.steps:
        stage.sampling = _start_sampling(stage, step + 1, time.perf_counter())
    long_enough = rollout.lengths >= rl.min_tokens
    return Sampled(
        queries=[collection.queries[row] for row in rows],
        positives=[stage.known[row] for row in rows],
        rollout=dataclasses.replace(rollout, valid=rollout.valid & long_enough),
        seconds=sampling.ended.result() - sampling.began,
        waited=time.perf_counter() - started,
    )


def _start_sampling(stage: RlStage, step: int, began: float) -> Sampling:
    """Dispatch the rollout of a step with the current parameters."""
    rl, collection, seed, rows = stage.config.rl, stage.collection, stage.config.seed, _rows_of(stage, step)
    rollout = stage.sampler.start(
        stage.current,
        [collection.queries[row].body for row in rows],
        rollout_seeds(seed, step, rows, rl.group_size),
        max_tokens=stage.config.text.max_query_tokens,
    )
    return Sampling(step=step, rows=rows, rollout=rollout, began=began, ended=_end_of(rollout))


def _texts_hash(stage: RlStage, rows: Sequence[int]) -> np.ndarray:
    """sha256 [32] uint8 of the texts of queries."""
    texts = [stage.collection.queries[row].body for row in rows]
    return np.frombuffer(bytes.fromhex(digest_of(texts)), np.uint8)


def _rows_of(stage: RlStage, step: int) -> Sequence[int]:
    """The queries of a step."""
    count = stage.config.rl.global_queries
    return shuffled(len(stage.collection.queries), stage.config.seed, step * count, count)


def _end_of(rollout: RunningRollout) -> Future[float]:
    """Gets the time at which the devices have ended; whoever asks for the result may come later."""
    ended = Future[float]()

    def wait() -> None:
        # What goes wrong is raised to whoever asks for the result.
        with suppress(Exception):
            jax.block_until_ready(rollout.replies)
        ended.set_result(time.perf_counter())

    threading.Thread(target=wait, daemon=True).start()
    return ended


def _follows_at_once(config: RunConfig, step: int) -> bool:
    """Whether the devices have nothing to do between a step's rollout and the step before.

    An evaluation, a checkpoint, and the documents that are encoded for the index come before it.
    """
    rl = config.rl
    evaluates = rl.eval_every > 0 and step % rl.eval_every == 0
    between = evaluates or step % rl.save_every == 0 or config.index.source != "snapshots"
    return rl.off_policy_steps == 0 and step < rl.steps and not between


def pending_arrays(stage: RlStage) -> dict[str, np.ndarray]:
    """The replies of the next step for a checkpoint, where they are of other parameters than the checkpoint.

    All processes call it.
    """
    if not stage.config.rl.off_policy_steps or stage.sampling is None:
        return {}
    sampling = stage.sampling
    rollout = sampling.rollout.result()
    arrays = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    arrays["texts"] = _texts_hash(stage, sampling.rows)
    arrays["seconds"] = np.array(sampling.ended.result() - sampling.began)
    return {f"{_PENDING}{name}": array for name, array in arrays.items()}


def restore_pending(stage: RlStage, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Take up the replies of `pending_arrays`; those to other queries, or of other sizes, are left."""
    rl, found = (
        stage.config.rl,
        {name.removeprefix(_PENDING): array for name, array in arrays.items() if name.startswith(_PENDING)},
    )
    rows = _rows_of(stage, step)
    tokens = rl.sampler.max_think_tokens + len(stage.prompter.reason.closing)
    fits = found and np.array_equal(found["texts"], _texts_hash(stage, rows))
    if not rl.off_policy_steps or not fits or found["ids"].shape != (len(rows) * rl.group_size, tokens):
        return
    replies = Replies(**{name: jnp.asarray(found[name]) for name in Replies._fields})
    rollout = RunningRollout(
        prompt_ids=found["prompt_ids"],
        prompt_lengths=found["prompt_lengths"],
        replies=replies,
        name=lambda row: f"reply {row}",
    )
    ended = Future[float]()
    ended.set_result(time.perf_counter())
    began = ended.result() - float(found["seconds"])
    stage.sampling = Sampling(step=step, rows=rows, rollout=rollout, began=began, ended=ended)


def score(stage: RlStage, state: TrainState, sampled: Sampled, index: LedIndex, step: int) -> Scored:
    """Rewards: candidates from the index, ranked under the parameters that `index.scoring` names."""
    started = time.perf_counter()
    config, rollout = stage.config, sampled.rollout
    Q, G = len(sampled.queries), config.rl.group_size
    vectors, params = rollout.vectors, stage.current
    if config.index.scoring == "consistent_stale":
        params = stage.merged(index.snapshot_params(state.params))
        vectors = reencode_rollout(
            stage.reasoned_encoder, params, sampled.texts, rollout, config.text.max_query_tokens
        )
    needs_direct = config.rl.reward.variant == "gain_over_direct"
    direct = stage.encode_queries(sampled.texts, params) if needs_direct else None

    def ask(environment: Environment) -> Message:
        result = environment.score(
            step,
            sampled.positives,
            vectors.reshape(Q, G, -1),
            rollout.valid.reshape(Q, G),
            tokens=rollout.lengths.reshape(Q, G),
            direct=direct,
        )
        rows = _contrasted_rows(stage, sampled, result, environment)
        return result_message(result) | {
            "advantages": _advantages(result.rewards, config.rl),
            "rows": rows,
            "documents": environment.vectors_of(rows),
        }

    told = index.ask(ask)
    return Scored(
        result=result_of(told),
        advantages=told["advantages"],
        rows=told["rows"],
        documents=told["documents"],
        seconds=time.perf_counter() - started,
    )


def update(
    stage: RlStage, state: TrainState, sampled: Sampled, scored: Scored, step: int
) -> tuple[TrainState, dict[str, float]]:
    """`rl.inner_epochs` updates on the rollout, and the step's metrics.

    The next rollout is dispatched before the metrics are read: the devices go on while the host counts, logs
    and writes.
    """
    started = time.perf_counter()
    rl, rollout, frozen = stage.config.rl, sampled.rollout, stage.frozen
    batch = make_update_batch(stage, sampled, scored)
    reference = None
    if rl.beta != 0:
        # Under LoRA the reference is the frozen base, else the parameters that stage 2 started from.
        full = stage.config.lora.rank == 0
        reference = stage.log_probs(stage.start, frozen, batch.replies, adapters=full)
    before = None
    if rl.inner_epochs > 1:
        before = stage.log_probs(state.params, frozen, batch.replies, adapters=True)
    # Of the first update: later ones of the step are as good as equal.
    rate = float(stage.rates[min(updates_made(state.optimizer), len(stage.rates) - 1)])
    scalars: dict[str, jax.Array] = {}
    log_probs: list[jax.Array] = []
    for _ in range(rl.inner_epochs):
        state, scalars, policy_log_probs = stage.update(state, frozen, batch, before, reference)
        log_probs.append(policy_log_probs)
    stage.current = stage.merged(state.params)
    if _follows_at_once(stage.config, step + 1):
        stage.sampling = _start_sampling(stage, step + 1, time.perf_counter())
    metrics = {name: float(value) for name, value in scalars.items()}
    ended = time.perf_counter()
    if stage.sampling is not None and not rl.off_policy_steps:
        # Before, the devices were busy with the update.
        stage.sampling = dataclasses.replace(stage.sampling, began=ended)
    seconds = ended - started
    trainer_bt = np.asarray(log_probs[0]).reshape(rollout.ids.shape)
    metrics |= step_scalars(rollout, scored.result, trainer_bt, sampled.seconds)
    metrics |= {
        "learning_rate": rate,
        "rollout_seconds": sampled.seconds,
        "rollout_wait_seconds": sampled.waited,
        "environment_seconds": scored.seconds,
        "update_seconds": seconds,
    }
    return state, metrics


def reencode_rollout(
    encoder: ReasonedEncoder, params: nnx.State, texts: Sequence[str], rollout: Rollout, max_tokens: int
) -> np.ndarray:
    """Vectors [B,E] of replies to `texts` [Q] under `params`; zero where a reply is not valid."""
    group = len(rollout.lengths) // len(texts)
    valid = np.flatnonzero(rollout.valid).tolist()
    replies = [rollout.ids[b, : rollout.lengths[b]].tolist() for b in valid]
    vectors = np.zeros_like(rollout.vectors)
    vectors[valid] = encoder.encode(
        params, [texts[b // group] for b in valid], replies, max_tokens=max_tokens
    )
    return vectors


def _advantages(rewards_qg: np.ndarray, rl: RlConfig) -> np.ndarray:
    """Advantages [B] float32 of rewards [Q,G]."""
    Q, G = rewards_qg.shape
    group_id = jnp.repeat(jnp.arange(Q), G)
    advantages, _ = group_advantages(
        jnp.asarray(rewards_qg).reshape(-1), group_id, groups=Q, scale=rl.scale_rewards
    )
    return np.asarray(advantages, np.float32)


def _contrasted_rows(
    stage: RlStage, sampled: Sampled, result: StepResult, environment: Environment
) -> np.ndarray:
    """The rows [P] of the documents that InfoNCE contrasts the queries with: first each query's own."""
    infonce, candidates = stage.config.rl.infonce, result.candidates
    if infonce.near_duplicate_cosine < 1:
        candidates = drop_near_duplicates(
            environment.vectors_of, sampled.positives, candidates, max_cosine=infonce.near_duplicate_cosine
        )
    return infonce_document_rows(
        sampled.positives, candidates, infonce.negatives, rows=len(stage.collection.documents)
    )


def make_update_batch(stage: RlStage, sampled: Sampled, scored: Scored) -> RlBatch:
    """The update's arrays, on the mesh."""
    rl, rows, Q = stage.config.rl, scored.rows, len(sampled.queries)
    relevance_qp = np.array(
        [[grades.get(row, 0) for row in rows.tolist()] for grades in sampled.positives], np.float32
    )
    trained = None
    if rl.infonce.train_documents:
        bodies = [document.body for document in stage.collection.documents_at(rows[:Q].tolist())]
        trained = tokenize_documents(stage.prompter, bodies, stage.config.text.max_document_tokens)
    batch = make_batch(
        sampled.rollout,
        scored.advantages,
        scored.documents,
        relevance_qp,
        trained=trained,
        micro_queries=rl.micro_queries,
    )
    return put_batch(batch, stage.mesh)
