"""Stage 2: GRPO on retrieval success, against an index that is rebuilt while training goes on."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.mixture import shuffled
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.retrieval.environment.environment import StepResult
from search_r3_jax.retrieval.environment.negatives import drop_near_duplicates, infonce_document_rows
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Rollout, rollout_seeds
from search_r3_jax.training.live_index import (
    IndexStart,
    LiveIndex,
    discard_index_versions_after,
    load_or_copy_schedule,
)
from search_r3_jax.training.loading import load_rl_data, load_training_model
from search_r3_jax.training.monitor import CollapseGuard
from search_r3_jax.training.rl_progress import RlProgress
from search_r3_jax.training.rl_report import ConstantTerms, sample_records, step_scalars
from search_r3_jax.training.rl_setup import RlStage, check_settings, make_stage
from search_r3_jax.training.rl_step import RlBatch, make_batch, put_batch, tokenize_documents
from search_r3_jax.training.run import RlRecord, Run, rl_record, with_absolute_paths
from search_r3_jax.training.state import TrainState
from search_r3_jax.training.stopping import StopRequest

BEST_BY = "dev_reason_ndcg@10"
OnStep = Callable[[int, int, dict[str, float]], object]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RlResult:
    """The result of stage 2.

    Attributes:
        params: the trained parameters.
        steps: steps taken.
        swaps: (step, index version) of every change of index.
        valid_rate: mean over the last quarter of the steps.
        reencoded_share: documents re-encoded a step, as a share of the corpus, on average.
        index_versions: every version used: step, recall@10 against exact search, seconds to encode and build.
    """

    params: nnx.State
    steps: int
    swaps: list[tuple[int, int]]
    valid_rate: float
    reencoded_share: float
    index_versions: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A step's queries and the replies to them.

    Attributes:
        positives: each query's relevant documents, row → grade.
        seconds: time to sample.
    """

    queries: list[Query]
    positives: list[Mapping[int, int]]
    rollout: Rollout
    seconds: float

    @property
    def texts(self) -> list[str]:
        """The queries' texts."""
        return [query.text for query in self.queries]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of the replies, and the seconds to compute them."""

    result: StepResult
    seconds: float


def train_rl(
    config: RunConfig,
    run_folder: Path | str,
    *,
    data: TrainingSet | None = None,
    model: LoadedModel | None = None,
    on_step: OnStep = lambda done, total, metrics: None,
    record: RlRecord | None = None,
    replay: Path | None = None,
    allow_config_change: bool = False,
) -> RlResult:
    """Run stage 2 to its last step; a second call with the same folder resumes from the last checkpoint.

    `data`, `model` and `record` come from the config where they are not given; the model is also the
    reference of the KL. `on_step(steps done, steps in all, metrics)`. `replay` is a run whose schedule of
    index versions a new run repeats. `allow_config_change` resumes a run with other settings.

    Raises UserError for settings that cannot work, before the first step, when the replies collapse, and
    when too many updates in a row are not finite; StoppedError on a stop signal. The last checkpoint is kept.
    """
    # 1. Build the stage.
    config, run_folder, rl = with_absolute_paths(config), Path(run_folder), config.rl
    data = data or load_rl_data(config)
    check_settings(config, data.train)
    record = record or rl_record(run_folder, config)
    stage, state = make_stage(config, data, model or load_training_model(config, step=record.start_step))
    record_json = record.to_json(data.train, replay)
    with _open_session(stage, run_folder, record_json, allow_config_change, on_step) as session:
        # 2. Restore the last checkpoint, and open the index in use there.
        state, progress, start = session.begin(state, replay, allow_other_version=allow_config_change)
        stage.current = stage.merged(state.params)
        index = LiveIndex.open(
            run_folder,
            config,
            data.train,
            stage.encode_documents,
            embed_id=stage.model.embed_id,
            start=start,
            on_wait=session.stop_waiting,
        )
        with closing(index):
            # 3. The loop. The index changes between steps only.
            while not progress.finished(rl):
                stalls = index.before_step(
                    progress.step, functools.partial(session.save_for_index, state, progress, index)
                )
                sampled = sample(stage, progress.step)
                scored = score(stage, state, sampled, index, progress.step)
                state, metrics = update(stage, state, sampled, scored, index)
                session.finish_step(state, progress, sampled, scored, metrics | stalls, index)
            # 4. The last checkpoint.
            session.save_last(state, progress, index)
    return RlResult(
        params=state.params,
        steps=progress.step,
        swaps=list(progress.index.swaps),
        valid_rate=progress.recent_valid_rate(),
        reencoded_share=progress.reencoded / max(1, progress.step) / len(data.train.documents),
        index_versions=[dict(version) for version in progress.index.versions],
    )


def sample(stage: RlStage, step: int) -> Sampled:
    """Sample G replies to each of Q queries with the current parameters."""
    started = time.perf_counter()
    rl, collection, seed = stage.config.rl, stage.collection, stage.config.seed
    rows = shuffled(len(collection.queries), seed, step * rl.global_queries, rl.global_queries)
    queries = [collection.queries[row] for row in rows]
    seeds_qg = rollout_seeds(seed, step, rows, rl.group_size)
    rollout = stage.sampler.sample(
        stage.current,
        [query.text for query in queries],
        seeds_qg,
        max_tokens=stage.config.text.max_query_tokens,
    )
    long_enough = rollout.lengths >= rl.min_tokens
    return Sampled(
        queries=queries,
        positives=[_positives(query, collection) for query in queries],
        rollout=dataclasses.replace(rollout, valid=rollout.valid & long_enough),
        seconds=time.perf_counter() - started,
    )


def score(stage: RlStage, state: TrainState, sampled: Sampled, index: LiveIndex, step: int) -> Scored:
    """Score the replies: candidates from the index, ranked under the parameters of `index.scoring`."""
    started = time.perf_counter()
    config, rollout = stage.config, sampled.rollout
    Q, G = len(sampled.queries), config.rl.group_size
    vectors, params = rollout.vectors, stage.current
    if config.index.scoring == "consistent_stale":
        params = stage.merged(index.checkpoint_params(state.params))
        vectors = reencode_rollout(
            stage.reasoned_encoder, params, sampled.texts, rollout, config.text.max_query_tokens
        )
    needs_direct = config.rl.reward.variant == "gain_over_direct"
    result = index.environment.score(
        step,
        sampled.positives,
        vectors.reshape(Q, G, -1),
        rollout.valid.reshape(Q, G),
        tokens=rollout.lengths.reshape(Q, G),
        direct=stage.encode_queries(sampled.texts, params) if needs_direct else None,
    )
    return Scored(result=result, seconds=time.perf_counter() - started)


def update(
    stage: RlStage, state: TrainState, sampled: Sampled, scored: Scored, index: LiveIndex
) -> tuple[TrainState, dict[str, float]]:
    """Make `rl.inner_epochs` updates on the rollout; returns the state and the step's metrics."""
    started = time.perf_counter()
    rl, rollout, frozen = stage.config.rl, sampled.rollout, stage.frozen
    batch = _make_batch(stage, sampled, scored.result, index)
    reference = None
    if rl.beta != 0:
        # Under LoRA the reference is the frozen base, else the parameters that stage 2 started from.
        full = stage.config.lora.rank == 0
        reference = stage.log_probs(stage.start, frozen, batch.replies, adapters=full)
    before = None
    if rl.inner_epochs > 1:
        before = stage.log_probs(state.params, frozen, batch.replies, adapters=True)
    scalars: dict[str, jax.Array] = {}
    log_probs: list[jax.Array] = []
    for _ in range(rl.inner_epochs):
        state, scalars, policy_log_probs = stage.update(state, frozen, batch, before, reference)
        log_probs.append(policy_log_probs)
    metrics = {name: float(value) for name, value in scalars.items()}
    seconds = time.perf_counter() - started
    trainer_bt = np.asarray(log_probs[0]).reshape(rollout.ids.shape)
    metrics |= step_scalars(rollout, scored.result, trainer_bt, sampled.seconds)
    metrics |= {
        "rollout_seconds": sampled.seconds,
        "environment_seconds": scored.seconds,
        "update_seconds": seconds,
    }
    return state, metrics


def reencode_rollout(
    encoder: ReasonedEncoder, params: nnx.State, texts: Sequence[str], rollout: Rollout, max_tokens: int
) -> np.ndarray:
    """Re-encode the replies to `texts` [Q] under `params`: vectors [B,E], zero where a reply is invalid."""
    group = len(rollout.lengths) // len(texts)
    valid = np.flatnonzero(rollout.valid).tolist()
    replies = [rollout.ids[b, : rollout.lengths[b]].tolist() for b in valid]
    vectors = np.zeros_like(rollout.vectors)
    vectors[valid] = encoder.encode(
        params, [texts[b // group] for b in valid], replies, max_tokens=max_tokens
    )
    return vectors


def _make_batch(stage: RlStage, sampled: Sampled, result: StepResult, index: LiveIndex) -> RlBatch:
    """Make the update's arrays: advantages, and the documents for InfoNCE."""
    rl, environment = stage.config.rl, index.environment
    Q, G = result.rewards.shape
    group_id = jnp.repeat(jnp.arange(Q), G)
    rewards = jnp.asarray(result.rewards).reshape(-1)
    advantages, _ = group_advantages(rewards, group_id, groups=Q, scale=rl.scale_rewards)
    candidates = result.candidates
    if rl.infonce.near_duplicate_cosine < 1:
        candidates = drop_near_duplicates(
            environment.vectors_of,
            sampled.positives,
            candidates,
            max_cosine=rl.infonce.near_duplicate_cosine,
        )
    rows = infonce_document_rows(
        sampled.positives, candidates, rl.infonce.negatives, rows=len(stage.collection.documents)
    )
    relevance_qp = np.array(
        [[grades.get(row, 0) for row in rows.tolist()] for grades in sampled.positives], np.float32
    )
    trained = None
    if rl.infonce.train_documents:
        bodies = [stage.collection.documents[row].body for row in rows[:Q].tolist()]
        trained = tokenize_documents(stage.prompter, bodies, stage.config.text.max_document_tokens)
    batch = make_batch(
        sampled.rollout,
        np.asarray(advantages),
        environment.vectors_of(rows),
        relevance_qp,
        trained=trained,
        micro_queries=rl.micro_queries,
    )
    return put_batch(batch, stage.mesh)


def _positives(query: Query, collection: Collection) -> dict[int, int]:
    return {collection.row_of[doc_id]: grade for doc_id, grade in query.positives.items()}


class _Session:
    """An open run of stage 2: its folder, its checkpoints, and the work between two steps."""

    def __init__(
        self,
        stage: RlStage,
        run: Run,
        checkpoints: CheckpointWriter,
        request: StopRequest,
        first: int | None,
        on_step: OnStep,
    ):
        rl = stage.config.rl
        self._stage, self._run, self._checkpoints, self._request = stage, run, checkpoints, request
        self._first, self._on_step = first, on_step
        self._guard = CollapseGuard(
            valid_below=rl.collapse.valid_rate, entropy_below=rl.collapse.entropy, steps=rl.collapse.steps
        )
        self._constant_terms = ConstantTerms()
        self._save_seconds = 0.0

    def begin(
        self, state: TrainState, replay: Path | None, *, allow_other_version: bool
    ) -> tuple[TrainState, RlProgress, IndexStart]:
        """Restore the last valid checkpoint; without one, evaluate and save step 0."""
        first = self._first
        load_or_copy_schedule(self._run.path, first or 0, replay=replay if first is None else None)
        # Without a checkpoint, step 0 is evaluated again: drop its earlier metrics.
        self._run.start_at(-1 if first is None else first)
        progress, arrays = RlProgress(), {}
        if first:
            restored = self._checkpoints.restore(first, state.params, state.optimizer)
            progress, arrays = RlProgress.from_meta(first, restored.meta), restored.arrays
            in_a_row = jax.device_put(np.int32(progress.skipped_in_a_row), state.skipped.sharding)
            state = TrainState(restored.params, restored.optimizer, in_a_row)
            self._guard.restore(progress.guard)
            logger.info("going on from step %d", first)
        if first is None:
            metrics = self._evaluate(state, 0)
            self._checkpoints.save(
                0, state.params, state.optimizer, progress.to_meta(), score=metrics.get(BEST_BY)
            )
            self._checkpoints.wait()
        start = IndexStart(
            step=progress.step,
            statistics=progress.index,
            arrays=arrays,
            allow_other_version=allow_other_version,
        )
        return state, progress, start

    def stop_waiting(self, step: int) -> None:
        """Stop here if requested: training waits at a step that is saved."""
        self._request.stop_waiting(self._run.path, step)

    def save(
        self,
        state: TrainState,
        progress: RlProgress,
        index: LiveIndex,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start to save a checkpoint of this step."""
        self._run.make_durable()
        progress.index = index.statistics
        self._checkpoints.save(
            progress.step,
            state.params,
            state.optimizer,
            progress.to_meta(),
            arrays=index.checkpoint_arrays(),
            score=(metrics or {}).get(BEST_BY),
        )

    def save_for_index(self, state: TrainState, progress: RlProgress, index: LiveIndex) -> None:
        """Commit a checkpoint of this step for the indexer, unless there is one."""
        if progress.step != self._checkpoints.latest():
            index.checkpoint_saved()
            self.save(state, progress, index)
            self._checkpoints.wait()

    def save_last(self, state: TrainState, progress: RlProgress, index: LiveIndex) -> None:
        """Save the last step, unless it is saved (a finished run called again with another `save_every`)."""
        if progress.step > (self._checkpoints.latest() or 0):
            self.save(state, progress, index)

    def finish_step(
        self,
        state: TrainState,
        progress: RlProgress,
        sampled: Sampled,
        scored: Scored,
        metrics: dict[str, float],
        index: LiveIndex,
    ) -> None:
        """Count, log, evaluate and save a step.

        Raises UserError where the run cannot go on, and StoppedError on a stop signal.
        """
        rl, step = self._stage.config.rl, progress.step
        phases = ("swap", "index_wait", "rollout", "environment", "update")
        metrics["seconds"] = sum(metrics[f"{phase}_seconds"] for phase in phases)
        progress.skipped_in_a_row = int(metrics.pop("skipped_in_a_row"))
        progress.skipped += progress.skipped_in_a_row > 0
        progress.reencoded += int(scored.result.stats["reencoded"])
        progress.valid_rates.append(metrics["valid_rate"])
        metrics |= {"skipped": progress.skipped, "save_seconds": self._save_seconds}
        self._constant_terms.observe(step, metrics)
        self._write_samples(step, sampled, scored)
        progress.step, progress.index = step + 1, index.statistics
        done = progress.step
        self._stage.current = self._stage.merged(state.params)
        evaluated = rl.eval_every > 0 and (done % rl.eval_every == 0 or done == rl.steps)
        if evaluated:
            metrics |= self._evaluate(state, done)
        drifted, drift = index.drifted(done)
        metrics |= drift
        self._run.log(step, metrics)
        self._on_step(done, rl.steps, metrics)
        problem = self._reason_to_stop(step, metrics, progress)
        stop_requested, self._save_seconds = self._request.asked(), 0.0
        should_save = evaluated or drifted or done % rl.save_every == 0 or done == rl.steps
        if should_save:
            index.checkpoint_saved()
        if should_save or problem or stop_requested:
            started = time.perf_counter()
            self.save(state, progress, index, metrics)
            self._save_seconds = time.perf_counter() - started
        if problem:
            raise UserError(f"{problem} (checkpoints are in {self._run.path})")
        if stop_requested and not progress.finished(rl):
            self._checkpoints.wait()
            self._request.stop(self._run.path, done)
        self._checkpoints.check()
        index.check()

    def _write_samples(self, step: int, sampled: Sampled, scored: Scored) -> None:
        stage = self._stage
        for record in sample_records(
            step,
            stage.config.rl.sample_every,
            sampled.queries,
            sampled.rollout,
            scored.result,
            stage.prompter,
            stage.collection,
        ):
            self._run.sample(record)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of the development queries, direct and reasoned; {} where there are none."""
        if self._stage.development is None:
            return {}
        params = self._stage.merged(state.params)
        metrics, searches = self._stage.development.evaluate(params, step, self._run.path)
        for search in searches:
            self._run.sample({"step": step - 1, **search})
        swapped = ""
        if "dev_swap_gain" in metrics:
            swapped = f"; with another query's reasoning {-metrics['dev_swap_gain']:+.3f}"
        direct, reasoned = metrics["dev_direct_ndcg@10"], metrics[BEST_BY]
        valid, tokens = metrics["dev_reason_valid_rate"], metrics["dev_reason_reply_tokens"]
        milliseconds = metrics["dev_reason_milliseconds_per_query"]
        logger.info(
            f"step {step}: nDCG@10 {direct:.3f} direct, {reasoned:.3f} reasoned ({valid:.0%} valid, "
            f"{tokens:.0f} tokens and {milliseconds:.0f} ms a query{swapped})"
        )
        return metrics

    def _reason_to_stop(self, step: int, metrics: Mapping[str, float], progress: RlProgress) -> str:
        """Count the step; return why the run cannot go on, or an empty string."""
        rl = self._stage.config.rl
        try:
            self._guard.observe(step, valid_rate=metrics["valid_rate"], entropy=metrics["entropy"])
        except UserError as error:
            return str(error)
        finally:
            progress.guard = self._guard.state()
        if progress.skipped_in_a_row >= rl.max_skipped * rl.inner_epochs:
            return (
                f"rl.optimizer.learning_rate: step {step}: {rl.max_skipped} steps in a row were not finite; "
                "lower the rate"
            )
        return ""


@contextmanager
def _open_session(
    stage: RlStage,
    run_folder: Path,
    record: dict[str, Any],
    allow_config_change: bool,
    on_step: OnStep,
) -> Iterator[_Session]:
    rl = stage.config.rl
    run = Run(
        run_folder,
        stage.config,
        stage="rl",
        record=record,
        allow_config_change=allow_config_change,
        on_change=lambda: discard_index_versions_after(run_folder, stage.config),
    )
    with closing(run):
        run.save_tokenizer(stage.model.tokenizer)
        # Before the writer is made, which lists the steps: damaged checkpoints are moved aside here.
        first = latest_valid_checkpoint(run_folder)
        checkpoints = CheckpointWriter(run_folder, keep=rl.keep, keep_every=rl.keep_every)
        with StopRequest() as request, closing(checkpoints):
            yield _Session(stage, run, checkpoints, request, first, on_step)
