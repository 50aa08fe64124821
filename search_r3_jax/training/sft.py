"""Stage 1: supervised contrastive fine-tuning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.chips import peak_flops
from search_r3_jax.compile_time import announce_compiling
from search_r3_jax.config import RunConfig, TrackerName, check_ranges
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PairBatch, PairPipeline
from search_r3_jax.data.tfidf_reasoning import TfidfReasoning
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.hub.model_names import check_model_name
from search_r3_jax.mesh import placed
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.profiling import TRAIN, part
from search_r3_jax.profiling import step as profiled_step
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import sharding
from search_r3_jax.training.development import Development, Evaluated, OnEvaluation
from search_r3_jax.training.loading import check_sizes, load_sft_data, load_training_model, log_cut_texts
from search_r3_jax.training.monitor import require_learning
from search_r3_jax.training.optimizer import learning_rates, make_optimizer, updates_made
from search_r3_jax.training.run import (
    Run,
    check_stage,
    data_sizes,
    data_version,
    led_starting_point,
    prompt_record,
    recorded_prompts,
    require_same_settings,
    with_absolute_paths,
)
from search_r3_jax.training.self_generated_reasoning import reasoned_pipeline
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.state import TrainState, committed, init_state, state_shardings
from search_r3_jax.training.stopping import StopRequest
from search_r3_jax.training.throughput import Throughput
from search_r3_jax.training.time_left import TimeLeft
from search_r3_jax.training.trackers import check_trackers

BEST_BY = "dev_direct_ndcg@10"
OnStep = Callable[[int, int, dict[str, float]], object]
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Stage:
    """The programs and the data of stage 1.

    Attributes:
        reference: starting values of the trainable parameters, for the KL of full fine-tuning; else None.
        development: evaluation on the development queries; None where there are none.
        on_evaluation: gets the progress of each evaluation.
        rates: the learning rate of each update.
    """

    config: RunConfig
    pipeline: PairPipeline
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    frozen: nnx.State
    reference: nnx.State | None
    mesh: Mesh | None
    throughput: Throughput
    development: Development | None
    time_left: TimeLeft
    on_evaluation: OnEvaluation
    rates: np.ndarray
    has_evaluated: bool = False

    def evaluates(self, done: int) -> bool:
        """Whether the development queries are evaluated after `done` steps."""
        sft = self.config.sft
        scheduled = sft.eval_every > 0 and (done % sft.eval_every == 0 or done == sft.steps)
        return self.development is not None and scheduled


def train_sft(
    config: RunConfig,
    run_folder: Path | str,
    *,
    sets: Sequence[TrainingSet] | None = None,
    model: LoadedModel | None = None,
    on_step: OnStep = lambda done, total, metrics: None,
    on_evaluation: OnEvaluation = lambda what, done, total: None,
    trackers: Sequence[TrackerName] = ("tensorboard",),
    allow_config_change: bool = False,
) -> nnx.State:
    """Run stage 1 to its last step; a second call with the same folder resumes from the last checkpoint.

    `sets` and `model` are loaded as the config says where they are not given. `on_step(steps done, steps in
    all, metrics)`; beside what is logged these have `seconds_each` and `seconds_left`. `on_evaluation(what,
    done, in all)`. `trackers` show the run beside its files. `allow_config_change` resumes a run with other
    settings. Returns the trained parameters.
    Raises UserError for settings that cannot work and when too many steps in a row were not finite, and
    StoppedError on a stop signal, saved.
    """
    # 1. Build the stage.
    team = Team()
    check_ranges(config, "sft")
    check_trackers(trackers)
    check_stage(Path(run_folder), "sft", team)
    check_model_name(config.model)
    require_same_settings(team, config)
    config, run_folder, sft = with_absolute_paths(config), Path(run_folder), config.sft
    sets = load_sft_data(config) if sets is None else sets
    _check(config, sets)
    point = led_starting_point(team, run_folder, config, choose=model is None)
    model = model or load_training_model(config, step=point.get("start_step"), revision=point.get("revision"))
    model = recorded_prompts(model, run_folder, team)
    check_sizes(config, model, "sft")
    for each in sets:
        log_cut_texts(model.prompter(), config.text, each.train)
    stage, state = _make_stage(config, sets, model, on_evaluation)
    record = _record(team, sets, model) | point
    with _open_run(config, run_folder, record, model, trackers, allow_config_change) as opened:
        run, checkpoints, request, first = opened
        # 2. Restore the last checkpoint.
        if sft.reasoning == "self":
            stage.pipeline = reasoned_pipeline(config, run_folder, stage.pipeline, model, team)
        state, skipped = _begin(stage, state, first, run, checkpoints)
        # 3. The loop.
        batch, save_seconds = stage.pipeline.batch(min(first, sft.steps - 1)), 0.0
        stage.time_left.start()
        for step in range(first, sft.steps):
            done = step + 1
            with announce_compiling("the step", when=step == first), profiled_step(TRAIN, step):
                state, metrics, next_batch = _train_step(stage, state, batch, step)
            in_a_row = int(metrics.pop("skipped_in_a_row"))
            skipped += in_a_row > 0
            # Seconds that the loop was blocked by the save before this step.
            metrics |= {"skipped": skipped, "save_seconds": save_seconds}
            batch, save_seconds = next_batch, 0.0
            evaluated = stage.evaluates(done)
            if evaluated:
                metrics |= _evaluate(stage, state, done, run)
            run.log(step, metrics)
            stage.time_left.step_ended()
            on_step(done, sft.steps, metrics | stage.time_left.metrics(done))
            stop_requested, failed = request.asked(), in_a_row >= sft.max_skipped
            should_save = evaluated or done % sft.save_every == 0 or done == sft.steps
            if should_save or stop_requested or failed:
                with stage.time_left.aside("save"):
                    run.make_durable()
                    meta = {"skipped": skipped, "skipped_in_a_row": in_a_row}
                    checkpoints.save(done, state.params, state.optimizer, meta, score=metrics.get(BEST_BY))
                save_seconds = stage.time_left.last("save")
            if failed:
                raise UserError(
                    f"sft.optimizer.learning_rate: step {step}: {in_a_row} steps in a row were not finite; "
                    f"lower the rate, and give another --run (the last good parameters are in {run_folder})"
                )
            if stop_requested and done < sft.steps:
                checkpoints.wait()
                request.stop(run_folder, done)
            checkpoints.check()
    require_learning(skipped, sft.steps, "sft")
    return state.params


def _make_stage(
    config: RunConfig, sets: Sequence[TrainingSet], model: LoadedModel, on_evaluation: OnEvaluation
) -> tuple[_Stage, TrainState]:
    sft = config.sft
    prompter = model.prompter()
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    # Orbax copies the arrays of a save before it returns, except on CPU, where it writes from their memory in
    # the background: they must not be donated there.
    donate = jax.default_backend() != "cpu"
    shardings = None if model.mesh is None else state_shardings(params, optimizer, model.mesh)
    stage = _Stage(
        config=config,
        pipeline=make_pipeline(config, [each.train for each in sets], prompter),
        step=make_step(graph, prompter, optimizer, sft, shardings, donate=donate),
        frozen=committed(frozen),
        # Under LoRA the base is the reference; full fine-tuning keeps a copy of its starting values.
        reference=params if sft.kl_weight > 0 and config.lora.rank == 0 else None,
        mesh=model.mesh,
        throughput=Throughput(
            model=model.decoder.config,
            lora=config.lora,
            peak=peak_flops(jax.devices()),
            with_base=sft.kl_weight > 0,
        ),
        development=(development := _make_development(config, sets, model, prompter)),
        time_left=TimeLeft(
            sft.steps, eval_every=sft.eval_every if development else 0, save_every=sft.save_every
        ),
        on_evaluation=on_evaluation,
        rates=learning_rates(sft.optimizer, sft.steps),
    )
    return stage, init_state(params, optimizer, shardings, copy=donate)


@contextmanager
def _open_run(
    config: RunConfig,
    run_folder: Path,
    record: dict[str, Any],
    model: LoadedModel,
    trackers: Sequence[TrackerName],
    allow_config_change: bool,
) -> Iterator[tuple[Run, CheckpointWriter, StopRequest, int]]:
    run = Run(
        run_folder,
        config,
        stage="sft",
        record=record,
        allow_config_change=allow_config_change,
        trackers=trackers,
    )
    with closing(run):
        run.save_tokenizer(model.tokenizer)
        # Before the writer is made, which lists the steps: damaged checkpoints are moved aside here.
        first = latest_valid_checkpoint(run_folder) or 0
        checkpoints = CheckpointWriter(run_folder, keep=config.sft.keep, keep_every=config.sft.keep_every)
        with StopRequest() as request, closing(checkpoints):
            yield run, checkpoints, request, first


def _begin(
    stage: _Stage, state: TrainState, first: int, run: Run, checkpoints: CheckpointWriter
) -> tuple[TrainState, int]:
    """Restore the checkpoint `first`, and its count of skipped steps; 0 is the start, which is evaluated."""
    skipped = 0
    if first:
        restored = checkpoints.restore(first, state.params, state.optimizer)
        skipped = restored.meta["skipped"]
        in_a_row = placed(np.int32(restored.meta["skipped_in_a_row"]), state.skipped.sharding)
        state = TrainState(restored.params, restored.optimizer, in_a_row)
        logger.info(f"going on from step {first}")
        run.start_at(first)
        stage.time_left.expect("evaluation", run.last("evaluation_seconds"))
        return state, skipped
    run.start_at(0)
    if stage.development is not None:
        evaluated = _develop(stage, stage.development, state, 0, run)
        logger.info(f"before training: {_summary(evaluated.scalars)}")
    return state, skipped


def _train_step(
    stage: _Stage, state: TrainState, batch: PairBatch, step: int
) -> tuple[TrainState, dict[str, float], PairBatch]:
    """Make one update: the new state, its metrics, and the next batch, packed while the device computes."""
    started = time.perf_counter()
    config, rate = stage.config, float(stage.rates[min(updates_made(state.optimizer), len(stage.rates) - 1)])
    key = jax.random.fold_in(jax.random.key(config.seed), step) if config.lora.dropout > 0 else None
    on_mesh = sharding.put_batch(batch, stage.mesh)
    state, scalars = stage.step(state, stage.frozen, on_mesh, stage.reference, key)
    with part("next batch"):
        next_batch = stage.pipeline.batch(step + 1) if step + 1 < config.sft.steps else batch
    with part("wait for the update"):
        metrics = {name: float(value) for name, value in scalars.items()}
    seconds = time.perf_counter() - started
    metrics |= {"learning_rate": rate, "padding_share": batch.padding_share(), "seconds": seconds}
    metrics |= stage.throughput.of(batch.queries, batch.documents, seconds)
    return state, metrics, next_batch


def _evaluate(stage: _Stage, state: TrainState, done: int, run: Run) -> dict[str, float]:
    """Metrics of the development queries; a few searches go to the run's samples."""
    if stage.development is None:
        return {}
    evaluated = _develop(stage, stage.development, state, done, run)
    run.sample([{"step": done - 1, **search} for search in evaluated.samples])
    logger.info(f"step {done}: {_summary(evaluated.scalars)}")
    return evaluated.scalars | {"evaluation_seconds": stage.time_left.last("evaluation")}


def _develop(stage: _Stage, development: Development, state: TrainState, done: int, run: Run) -> Evaluated:
    """One evaluation, whose time is no step's."""
    announced = announce_compiling("the first evaluation", when=not stage.has_evaluated)
    with announced, stage.time_left.aside("evaluation"):
        params = nnx.merge_state(state.params, stage.frozen)
        evaluated = development.evaluate(params, done, run.path, stage.on_evaluation)
        run.show_embeddings(done, evaluated.embeddings)
    stage.has_evaluated = True
    return evaluated


def _check(config: RunConfig, sets: Sequence[TrainingSet]) -> None:
    """Raise UserError where the settings do not fit each other or the data."""
    sft = config.sft
    pairs = sum(len(query.positives) for each in sets for query in each.train.queries)
    if sft.global_batch > pairs:
        raise UserError(
            f"sft.global_batch: {sft.global_batch}: there are {pairs} pairs to train on; give that many or "
            "fewer"
        )
    if sft.global_batch == 1 and not sft.negatives and (sft.infonce_weight or sft.triplet_weight):
        raise UserError(
            "sft.global_batch: 1: a pair alone has nothing to be told apart from; give 2 or more, or "
            "sft.negatives"
        )
    if len(set(config.data.sets)) < len(config.data.sets):
        raise UserError(
            "data.sets: the same one is there twice; name each once, and weigh it by data.weights"
        )
    if len(set(sft.matryoshka)) < len(sft.matryoshka):
        raise UserError(f"sft.matryoshka: {' '.join(map(str, sft.matryoshka))}: name each once")
    if sft.encode_chunk and sft.global_batch % sft.encode_chunk:
        raise UserError(
            f"sft.encode_chunk: {sft.encode_chunk}: does not divide sft.global_batch {sft.global_batch}; 0 "
            "is the whole batch"
        )
    if "query_to_document" not in sft.directions or len(set(sft.directions)) != len(sft.directions):
        raise UserError(
            f"sft.directions: {' '.join(sft.directions)}: name each once, query_to_document among them"
        )
    if sft.partition == "per_direction" and {"query_to_query", "document_to_document"} & set(sft.directions):
        raise UserError(
            "sft.partition: per_direction: has no place for query_to_query and document_to_document; choose "
            "joint"
        )
    if sft.reasoning == "column" and sft.reasoned_share > 0:
        for each in sets:
            for query in each.train.queries:
                if query.positives and not query.reasoning:
                    raise UserError(
                        f"sft.reasoning: column: {each.train.name}, query {query.query_id!r} has no "
                        "reasoning; "
                        "give it one in the data set, or choose key_terms or self"
                    )


def make_pipeline(config: RunConfig, collections: Sequence[Collection], prompter: Prompter) -> PairPipeline:
    """Make the pipeline of batches of stage 1."""
    sft = config.sft
    chunk = sft.encode_chunk or sft.global_batch
    return PairPipeline(
        mixture=Mixture(
            collections=tuple(collections),
            weights=config.data.weights,
            together=config.sft.global_batch if config.data.batches == "one_set" else 1,
            seed=config.seed,
        ),
        prompter=prompter,
        global_batch=sft.global_batch,
        encode_chunk=chunk,
        max_query_tokens=config.text.max_query_tokens,
        max_document_tokens=config.text.max_document_tokens,
        max_thought_tokens=config.text.max_thought_tokens,
        reasoned=round(sft.reasoned_share * chunk) if sft.reasoning != "off" else 0,
        negatives=sft.negatives,
        tfidf_reasoning=tuple(TfidfReasoning(each, count=sft.key_terms) for each in collections)
        if sft.reasoning == "key_terms"
        else (),
    )


def _record(team: Team, sets: Sequence[TrainingSet], model: LoadedModel) -> dict[str, Any]:
    """What `config.json` tells of data and prompts; UserError in all processes where they differ."""
    record = {
        "data_version": [data_version(each.train) for each in sets],
        "data_sizes": [data_sizes(each.train) for each in sets],
        **prompt_record(model.prompter()),
    }
    watched = [None if each.dev is None else data_version(each.dev) for each in sets]
    team.require_same("data.sets, model", record | {"dev": watched})
    return record


def _make_development(
    config: RunConfig, sets: Sequence[TrainingSet], model: LoadedModel, prompter: Prompter
) -> Development | None:
    collections = [each.dev for each in sets if each.dev is not None]
    if not collections or config.sft.eval_every == 0:
        return None
    reasoned = config.sft.reasoning != "off" and config.sft.reasoned_share > 0
    return Development(
        config, collections, nnx.split(model.decoder)[0], prompter, reasoned=reasoned, mesh=model.mesh
    )


def _summary(scalars: dict[str, float]) -> str:
    """One line about an evaluation, for the log."""
    text = f"nDCG@10 {scalars[BEST_BY]:.3f} direct"
    if "dev_reason_ndcg@10" in scalars:
        text += (
            f", {scalars['dev_reason_ndcg@10']:.3f} reasoned ({scalars['dev_reason_valid_rate']:.0%} valid,"
            f" {scalars['dev_reason_reply_tokens']:.0f} tokens and "
            f"{scalars['dev_reason_milliseconds_per_query']:.0f} ms a query)"
        )
    return text
