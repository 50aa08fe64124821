"""An open run of stage 2: its folder, its checkpoints, and what happens between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from search_r3_jax.compile_time import announce_compiling
from search_r3_jax.config import TrackerName
from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.snapshot_reader import has_snapshot, snapshot_dtype
from search_r3_jax.mesh import placed
from search_r3_jax.training.development import OnEvaluation
from search_r3_jax.training.index_state import IndexStart
from search_r3_jax.training.led_index import LedIndex
from search_r3_jax.training.live_index import discard_index_versions_after, load_or_copy_schedule
from search_r3_jax.training.monitor import CollapseGuard, effective_rank
from search_r3_jax.training.rl_acts import Sampled, Scored, pending_arrays, restore_pending
from search_r3_jax.training.rl_progress import RlProgress
from search_r3_jax.training.rl_report import ConstantTerms, sample_records
from search_r3_jax.training.rl_setup import RlStage
from search_r3_jax.training.run import Run
from search_r3_jax.training.state import TrainState
from search_r3_jax.training.stopping import StopRequest
from search_r3_jax.training.time_left import TimeLeft

BEST_BY = "dev_reason_ndcg@10"
# While training waits, how often the processes tell each other whether one was asked to stop.
ASK_SECONDS = 1.0
# At 2,048 replies of width 1,536 it takes a third of a second on the host.
RANK_EVERY = 16
OnStep = Callable[[int, int, dict[str, float]], object]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told of a run: after each step, during an evaluation, and the trackers."""

    on_step: OnStep
    on_evaluation: OnEvaluation
    trackers: Sequence[TrackerName]


class RlSession:
    """An open run of stage 2: its folder, its checkpoints, and what happens between two steps."""

    def __init__(
        self,
        stage: RlStage,
        team: Team,
        run: Run,
        checkpoints: CheckpointWriter,
        request: StopRequest,
        first: int | None,
        listeners: Listeners,
    ):
        rl = stage.config.rl
        self._stage, self._team, self._run = stage, team, run
        self._checkpoints, self._request = checkpoints, request
        self._stop_asked = team.together("stop asked", request.asked)
        self._first, self._listeners = first, listeners
        evaluates = stage.development is not None
        self.time_left = TimeLeft(
            rl.steps, eval_every=rl.eval_every if evaluates else 0, save_every=rl.save_every
        )
        self._has_evaluated, self._has_versions = False, stage.config.index.source != "rolling"
        self._guard = CollapseGuard(
            valid_below=rl.collapse.valid_rate, entropy_below=rl.collapse.entropy, steps=rl.collapse.steps
        )
        self._constant_terms = ConstantTerms()
        self._save_seconds, self._ask_at = 0.0, 0.0

    def begin(
        self, state: TrainState, replay: Path | None, *, allow_other_version: bool
    ) -> tuple[TrainState, RlProgress, IndexStart]:
        """State and progress of the last valid checkpoint; without one, of step 0, evaluated and saved."""
        first = self._first

        def prepare_schedule() -> Message:
            if self._has_versions:
                load_or_copy_schedule(self._run.path, first or 0, replay=replay if first is None else None)
            return {}

        self._team.lead(prepare_schedule)
        # A run that has not saved yet evaluates step 0 again.
        self._run.start_at(-1 if first is None else first)
        progress, arrays = RlProgress(), {}
        if first:
            restored = self._checkpoints.restore(first, state.params, state.optimizer)
            progress, arrays = RlProgress.from_meta(first, restored.meta), restored.arrays
            in_a_row = placed(np.int32(progress.skipped_in_a_row), state.skipped.sharding)
            state = TrainState(restored.params, restored.optimizer, in_a_row)
            self._guard.restore(progress.guard)
            restore_pending(self._stage, first, arrays)
            logger.info("going on from step %d", first)
            self.time_left.expect("evaluation", self._run.last("evaluation_seconds"))
        if first is None:
            metrics = self._evaluate(state, 0)
            self._save(state, progress, {}, metrics)
            self._checkpoints.wait()
        else:
            self._save_missing_snapshot(first, state)
        start = IndexStart(
            step=progress.step,
            statistics=progress.index,
            arrays=arrays,
            allow_other_version=allow_other_version,
        )
        return state, progress, start

    def _save_missing_snapshot(self, step: int, state: TrainState) -> None:
        """Save the snapshot of the checkpoint that the run goes on from, where it has none.

        A kill came between the two, or the run is from before there were snapshots.
        """
        if not self._has_versions:
            return
        if not self._team.lead(lambda: {"there": has_snapshot(self._run.path, step)})["there"]:
            self._checkpoints.save_snapshot(step, state.params)
            # The index in use may be waited for next, and is built from it.
            self._checkpoints.wait()

    def stop_waiting(self, step: int) -> None:
        """Stop here if any process was asked to: training waits at a step that is saved."""
        if time.monotonic() < self._ask_at:
            return
        if self._stop_asked():
            self._request.stop(self._run.path, step)
        self._ask_at = time.monotonic() + (ASK_SECONDS if jax.process_count() > 1 else 0)

    def before_step(self, state: TrainState, progress: RlProgress, index: LedIndex) -> dict[str, float]:
        """Swap in the index version of the next step; the seconds that training waited for it."""

        def save() -> None:
            index.checkpoint_saved()
            self.save(state, progress, index)
            self._checkpoints.wait()

        save_together = self._team.together("save", save)

        def save_if_new() -> None:
            if progress.step != self._checkpoints.latest():
                save_together()
            else:
                # The index that is waited for comes from it.
                self._checkpoints.wait()

        try:
            with self.time_left.aside("wait"):
                return index.before_step(progress.step, save_if_new)
        finally:
            # Or it would keep the state in memory that the step replaces.
            self._team.forget("save")

    def save(
        self,
        state: TrainState,
        progress: RlProgress,
        index: LedIndex,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a checkpoint of this step."""
        progress.index = index.statistics
        arrays = index.checkpoint_arrays() | pending_arrays(self._stage)
        self._save(state, progress, arrays, metrics or {})

    def save_last(self, state: TrainState, progress: RlProgress, index: LedIndex) -> None:
        """Save the last step, where a finished run was called again with fewer steps between checkpoints."""
        if progress.step > self._team.lead(lambda: {"latest": self._checkpoints.latest() or 0})["latest"]:
            self.save(state, progress, index)

    def _save(
        self,
        state: TrainState,
        progress: RlProgress,
        arrays: Mapping[str, np.ndarray],
        metrics: Mapping[str, float],
    ) -> None:
        self._run.make_durable()
        told = self._team.lead(lambda: {"meta": progress.to_meta(), "score": metrics.get(BEST_BY)})
        self._checkpoints.save(
            progress.step,
            state.params,
            state.optimizer,
            told["meta"],
            arrays=arrays,
            score=told["score"],
        )

    def finish_step(
        self,
        state: TrainState,
        progress: RlProgress,
        sampled: Sampled,
        scored: Scored,
        metrics: dict[str, float],
        index: LedIndex,
    ) -> None:
        """Count, log, evaluate and save a step; raises UserError where the run cannot go on, StoppedError."""
        rl, step = self._stage.config.rl, progress.step
        phases = ("swap", "index_wait", "rollout_wait", "environment", "update")
        metrics["seconds"] = sum(metrics[f"{phase}_seconds"] for phase in phases)
        progress.skipped_in_a_row = int(metrics.pop("skipped_in_a_row"))
        progress.skipped += progress.skipped_in_a_row > 0
        progress.reencoded += int(scored.result.stats["reencoded"])
        progress.valid_rates.append(metrics["valid_rate"])
        metrics |= {"skipped": progress.skipped, "save_seconds": self._save_seconds}
        if step % RANK_EVERY == 0:
            metrics["effective_rank"] = effective_rank(sampled.rollout.vectors)
        self._constant_terms.observe(step, metrics)
        self._write_samples(step, sampled, scored)
        progress.step, progress.index = step + 1, index.statistics
        done = progress.step
        evaluated = rl.eval_every > 0 and (done % rl.eval_every == 0 or done == rl.steps)
        if evaluated:
            metrics |= self._evaluate(state, done)
        drifted, drift = index.drifted(done)
        metrics |= drift
        self._run.log(step, metrics)
        self.time_left.step_ended()
        self._listeners.on_step(done, rl.steps, metrics | self.time_left.metrics(done))
        problem = self._team.lead(lambda: {"problem": self._reason_to_stop(step, metrics, progress)})[
            "problem"
        ]
        stop_requested, self._save_seconds = self._request.asked(), 0.0
        should_save = evaluated or drifted or done % rl.save_every == 0 or done == rl.steps
        if should_save:
            index.checkpoint_saved()
        if should_save or problem or stop_requested:
            with self.time_left.aside("save"):
                self.save(state, progress, index, metrics)
            self._save_seconds = self.time_left.last("save")
        if problem:
            raise UserError(f"{problem} (checkpoints are in {self._run.path})")
        if stop_requested and not progress.finished(rl):
            self._checkpoints.wait()
            self._request.stop(self._run.path, done)
        self._checkpoints.check()
        index.check()

    def _write_samples(self, step: int, sampled: Sampled, scored: Scored) -> None:
        stage = self._stage
        records = sample_records(
            step,
            stage.config.rl.sample_every,
            sampled.queries,
            sampled.rollout,
            scored.result,
            stage.prompter,
            stage.collection,
        )
        self._run.sample(records)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of the development queries, direct and reasoned; {} where there are none."""
        if self._stage.development is None:
            return {}
        announced = announce_compiling("the first evaluation", when=not self._has_evaluated)
        with announced, self.time_left.aside("evaluation"):
            params = self._stage.merged(state.params)
            evaluated = self._stage.development.evaluate(
                params, step, self._run.path, self._listeners.on_evaluation
            )
            self._run.show_embeddings(step, evaluated.embeddings)
        self._has_evaluated, metrics = True, evaluated.scalars
        self._run.sample([{"step": step - 1, **search} for search in evaluated.samples])
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
        return metrics | {"evaluation_seconds": self.time_left.last("evaluation")}

    def _reason_to_stop(self, step: int, metrics: Mapping[str, float], progress: RlProgress) -> str:
        """Why the run cannot go on, or nothing; counts the step."""
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
def open_session(
    stage: RlStage,
    team: Team,
    run_folder: Path,
    record: dict[str, Any],
    allow_config_change: bool,
    listeners: Listeners,
) -> Iterator[RlSession]:
    """Open run folder, checkpoints and stop signals; `record` stands beside the config in `config.json`."""
    rl = stage.config.rl
    run = Run(
        run_folder,
        stage.config,
        stage="rl",
        record=record,
        allow_config_change=allow_config_change,
        on_change=lambda: discard_index_versions_after(run_folder, stage.config),
        trackers=listeners.trackers,
    )
    with closing(run):
        run.save_tokenizer(stage.model.tokenizer)
        # Before the writer, which remembers the steps that are there: a damaged one is put aside.
        first = latest_valid_checkpoint(run_folder)
        checkpoints = CheckpointWriter(
            run_folder,
            keep=rl.keep,
            keep_every=rl.keep_every,
            snapshot_dtype=None if stage.config.index.source == "rolling" else snapshot_dtype(stage.config),
        )
        with StopRequest() as request, closing(checkpoints):
            yield RlSession(stage, team, run, checkpoints, request, first, listeners)
