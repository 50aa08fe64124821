"""Stage 1: supervised contrastive fine-tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PairPipeline
from search_r3_jax.data.tfidf_reasoning import TfidfReasoning
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import sharding
from search_r3_jax.training.development import Development
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.run import Run, data_version
from search_r3_jax.training.self_generated_reasoning import with_self_generated_reasoning
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.state import TrainState, init_state, state_shardings
from search_r3_jax.training.stopping import StopRequest
from search_r3_jax.training.throughput import Throughput, peak_flops

BEST_BY = "dev_direct_ndcg@10"
Say = Callable[[str], object]
OnStep = Callable[[int, int, dict[str, float]], object]


def train_sft(
    config: RunConfig,
    folder: Path,
    sets: Sequence[TrainingSet],
    model: LoadedModel,
    on_step: OnStep,
    *,
    say: Say,
    allow_change: bool = False,
) -> nnx.State:
    """Run stage 1 to its last step, from the newest sound checkpoint where there is one; returns the trained
    parameters.

    `on_step(steps done, steps in all, scalars)`; `allow_change` as in `Run`. Raises UserError when too many
    steps in a row were not finite, and StoppedError when it was asked to stop (`StopRequest`), saved.
    """
    # Act 1: what is needed.
    sft = config.sft
    _check(config, sets)
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [each.train for each in sets], prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    # Orbax reads the arrays of a save before it returns, except on CPU, where it writes from their own memory
    # in the background.
    donate = jax.default_backend() != "cpu"
    shardings = None if model.mesh is None else state_shardings(params, optimizer, model.mesh)
    state = init_state(params, optimizer, shardings, copy=donate)
    # Under LoRA the base itself is the reference; full fine-tuning keeps a copy of where it began.
    reference = params if sft.kl_weight > 0 and config.lora.rank == 0 else None
    step_function = make_step(graph, prompter, optimizer, sft, shardings, donate=donate)
    throughput = Throughput(
        model=model.decoder.config, lora=config.lora, peak=peak_flops(), with_base=sft.kl_weight > 0
    )
    development = _make_development(config, sets, model, prompter)

    # Act 2: the run directory, and where to begin.
    extra = {"data_version": [data_version(each.train) for each in sets]}
    run = Run(folder, config, stage="sft", say=say, extra=extra, allow_change=allow_change)
    run.save_tokenizer(model.tokenizer)
    if sft.reasoning == "self":
        pipeline = _self_generated_reasoning(config, folder, pipeline, model, say)
    first, skipped = latest_valid_checkpoint(folder, say) or 0, 0
    checkpoints = CheckpointWriter(folder, keep=sft.keep, keep_every=sft.keep_every)
    with StopRequest(say) as request, closing(run), closing(checkpoints):
        if first:
            restored = checkpoints.restore(first, state.params, state.optimizer)
            skipped = restored.meta["skipped"]
            in_a_row = jax.device_put(np.int32(restored.meta["skipped_in_a_row"]), state.skipped.sharding)
            state = TrainState(restored.params, restored.optimizer, in_a_row)
            say(f"going on from step {first}")
        elif development is not None:
            scalars, _ = development.evaluate(nnx.merge_state(state.params, frozen), 0, folder)
            say(f"before training: {_told(scalars)}")
        run.start_at(first)

        # Act 3: the loop.
        batch, saving = pipeline.batch(min(first, sft.steps - 1)), 0.0
        for step in range(first, sft.steps):
            started = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(config.seed), step) if config.lora.dropout > 0 else None
            state, found = step_function(state, frozen, sharding.put_batch(batch, model.mesh), reference, key)
            # The host packs the next batch while the device computes this one.
            following = pipeline.batch(step + 1) if step + 1 < sft.steps else batch
            values = {name: float(value) for name, value in found.items()}
            in_a_row = int(values.pop("skipped_in_a_row"))
            skipped += in_a_row > 0
            values |= {
                "skipped": skipped,
                "padding_share": batch.padding_share(),
                "seconds": time.perf_counter() - started,
            }
            # What the save before this step kept the loop from going on.
            values["save_seconds"], saving = saving, 0.0
            values |= throughput.of(batch.queries, batch.documents, values["seconds"])
            batch, done = following, step + 1

            looked = (
                development is not None
                and sft.eval_every > 0
                and (done % sft.eval_every == 0 or done == sft.steps)
            )
            if development is not None and looked:
                scalars, samples = development.evaluate(nnx.merge_state(state.params, frozen), done, folder)
                values |= scalars
                for sample in samples:
                    run.sample({"step": step, **sample})
                say(f"step {done}: {_told(scalars)}")
            run.log(step, values)
            on_step(done, sft.steps, values)
            stop = request.asked()
            if (
                looked
                or stop
                or done % sft.save_every == 0
                or done == sft.steps
                or in_a_row >= sft.max_skipped
            ):
                started = time.perf_counter()
                run.make_durable()
                meta = {"skipped": skipped, "skipped_in_a_row": in_a_row}
                checkpoints.save(done, state.params, state.optimizer, meta, score=values.get(BEST_BY))
                saving = time.perf_counter() - started
            if in_a_row >= sft.max_skipped:
                raise UserError(
                    f"sft.optimizer.learning_rate: step {step}: {in_a_row} steps in a row were not finite; "
                    "lower the rate, and "
                    f"give another --run (the last good parameters are in {folder})"
                )
            if stop and done < sft.steps:
                checkpoints.wait()
                request.stop(folder, done)
            checkpoints.check()
    return state.params


def _check(config: RunConfig, sets: Sequence[TrainingSet]) -> None:
    """Raises UserError where the settings do not fit each other or the data."""
    sft = config.sft
    pairs = sum(len(query.positives) for each in sets for query in each.train.queries)
    if sft.global_batch > pairs:
        raise UserError(
            f"sft.global_batch: {sft.global_batch}: there are {pairs} pairs to train on; give that many or "
            "fewer"
        )
    if sft.encode_chunk < 0 or (sft.encode_chunk and sft.global_batch % sft.encode_chunk):
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
    """The batches of stage 1."""
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
        key_terms=tuple(TfidfReasoning(each, count=sft.key_terms) for each in collections)
        if sft.reasoning == "key_terms"
        else (),
    )


def _self_generated_reasoning(
    config: RunConfig, folder: Path, pipeline: PairPipeline, model: LoadedModel, say: Callable[[str], object]
) -> PairPipeline:
    """The pipeline with the model's own text as the reasoning of just the queries that are trained in the
    reasoned format."""
    wanted = {
        (pair.set, pair.query) for step in range(config.sft.steps) for pair in pipeline.reasoned_pairs(step)
    }
    collections = with_self_generated_reasoning(
        config,
        folder / "own_reasoning.jsonl",
        pipeline.mixture.collections,
        wanted,
        model,
        lambda done, total: say(f"the model writes its own reasoning: {done}/{total} queries"),
    )
    return dataclasses.replace(
        pipeline, mixture=dataclasses.replace(pipeline.mixture, collections=collections)
    )


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


def _told(scalars: dict[str, float]) -> str:
    """What a reader wants to know of an evaluation."""
    told = f"nDCG@10 {scalars[BEST_BY]:.3f} direct"
    if "dev_reason_ndcg@10" in scalars:
        told += (
            f", {scalars['dev_reason_ndcg@10']:.3f} reasoned ({scalars['dev_reason_valid_rate']:.0%} valid,"
            f" {scalars['dev_reason_reply_tokens']:.0f} tokens and "
            f"{scalars['dev_reason_milliseconds_per_query']:.0f} ms a query)"
        )
    return told
