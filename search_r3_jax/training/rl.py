"""Stage 2: GRPO on retrieval success, against an index that is rebuilt while training goes on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import RlConfig, RunConfig
from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.mixture import shuffled
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import read_run
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter, latest_valid_checkpoint
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.retrieval.environment.environment import infonce_document_rows
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.worker import index_folder
from search_r3_jax.rollout.encoder import Encoder, ReasonedEncoder
from search_r3_jax.rollout.sampler import rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.development import Development
from search_r3_jax.training.live_index import MovingIndex, reencode_rollout, versions_to_keep
from search_r3_jax.training.monitor import CollapseGuard
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.rl_report import ConstantTerms, sample_records, step_scalars
from search_r3_jax.training.rl_setup import (
    check_settings,
    discard_index_versions_after,
    load_or_copy_schedule,
    make_environment,
    make_sampler,
    open_initial_index,
)
from search_r3_jax.training.rl_step import (
    RlBatch,
    Scorer,
    make_batch,
    make_scorer,
    make_update,
    put_batch,
    tokenize_documents,
)
from search_r3_jax.training.run import Run, data_version
from search_r3_jax.training.state import TrainState, init_state, state_shardings
from search_r3_jax.training.stopping import StopRequest

BEST_BY = "dev_reason_ndcg@10"
# The step of what is told of a run before its first.
BEFORE = -1
OnStep = Callable[[int, int, dict[str, float]], object]
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class RlResult:
    """What stage 2 leaves.

    Attributes:
        steps: updates taken.
        swaps: (step, index version) of every change of index.
        valid_rate: mean over the last quarter of the steps.
        reencoded_share: documents re-encoded a step, as a share of the corpus, on average.
        index_versions: every version taken in: step, recall@10 against exact search, build seconds.
    """

    params: nnx.State
    steps: int
    swaps: list[tuple[int, int]]
    valid_rate: float
    reencoded_share: float
    index_versions: list[dict[str, float]]


def train_rl(
    config: RunConfig,
    folder: Path,
    data: TrainingSet,
    model: LoadedModel,
    on_step: OnStep,
    *,
    say: Say,
    extra: dict[str, Any],
    allow_change: bool = False,
    replay: Path | None = None,
) -> RlResult:
    """Run stage 2 to its last step, from the newest sound checkpoint where there is one.

    `model` holds the parameters that stage 1 left, which also are the reference; `extra` is what the indexer
    process has to know (data set, start). `on_step(steps done, steps in all, scalars)`; `allow_change` as in
    `Run`; `replay` is a run whose record of index versions a new run repeats. Raises UserError for settings
    that cannot work, before the first step, and when the replies collapse or too many updates in a row are
    not finite, and StoppedError when it was asked to stop; the last checkpoint is kept.
    """
    # Act 1: what is needed.
    rl, collection = config.rl, data.train
    check_settings(config, collection)
    prompter = Prompter(model.tokenizer)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    full_graph = nnx.split(model.decoder)[0]
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.inner_epochs)
    # As in stage 1: Orbax writes from the arrays' own memory on a CPU.
    donate = jax.default_backend() != "cpu"
    shardings = None if model.mesh is None else state_shardings(params, optimizer, model.mesh)
    state = init_state(params, optimizer, shardings, copy=donate)
    sampler = make_sampler(full_graph, prompter, rl, model.mesh)
    encoder, reasoned_encoder = (
        Encoder(full_graph, prompter, mesh=model.mesh),
        ReasonedEncoder(full_graph, prompter, mesh=model.mesh),
    )
    score = make_scorer(graph, prompter, rl, shardings)
    update = make_update(graph, prompter, optimizer, rl, shardings, donate=donate)
    watched = [data.dev] if data.dev is not None and rl.eval_every > 0 else []
    development = (
        Development(config, watched, full_graph, prompter, reasoned=True, probe=True, mesh=model.mesh)
        if watched
        else None
    )
    guard = CollapseGuard(
        valid_below=rl.collapse_valid, entropy_below=rl.collapse_entropy, steps=rl.collapse_steps
    )
    constant = ConstantTerms(say)

    current = nnx.merge_state(state.params, frozen)

    def encode(texts: Sequence[str], max_tokens: int) -> np.ndarray:
        return encoder.encode(current, texts, max_tokens=max_tokens)

    def encode_documents(rows: np.ndarray) -> np.ndarray:
        return encode([collection.documents[int(row)].body for row in rows], config.text.max_document_tokens)

    if not np.isfinite(encode([collection.queries[0].text], config.text.max_query_tokens)).all():
        raise UserError(
            f"model: {config.model}: its embeddings are not finite, nor would any reward be; start from "
            "another checkpoint"
        )

    # Act 2: the run directory, the first checkpoint, and the index made from it by the indexer process.
    extra = {**extra, "data_version": data_version(collection)} | (
        {} if replay is None else {"replay": str(replay)}
    )
    forget = functools.partial(discard_index_versions_after, folder, config, say)
    run = Run(folder, config, stage="rl", say=say, extra=extra, allow_change=allow_change, on_change=forget)
    run.save_tokenizer(model.tokenizer)
    first = latest_valid_checkpoint(folder, say)
    schedule = load_or_copy_schedule(folder, first or 0, replay=replay if first is None else None)
    checkpoints = CheckpointWriter(folder, keep=rl.keep, keep_every=rl.keep_every)
    needed = functools.partial(versions_to_keep, folder, schedule, rl.keep)
    follower = IndexFollower(
        folder,
        collection.corpus_hash(),
        model.embed_id,
        say=say,
        settings=config.index,
        needed=needed,
        replayed=None if replay is None else index_folder(replay, read_run(replay)[0].index.folder),
    )
    meta: dict[str, Any] = {
        "index_version": 0,
        "swaps": [],
        "index_versions": [],
        "reencoded": 0,
        "valid": [],
    }
    meta |= {"skipped": 0, "skipped_in_a_row": 0, "guard": guard.state()}
    with StopRequest(say) as request, closing(run), closing(checkpoints), closing(follower):
        arrays: Mapping[str, np.ndarray] = {}
        if first:
            restored = checkpoints.restore(first, state.params, state.optimizer)
            meta, arrays = restored.meta, restored.arrays
            in_a_row = jax.device_put(np.int32(meta["skipped_in_a_row"]), state.skipped.sharding)
            state = TrainState(restored.params, restored.optimizer, in_a_row)
            guard.restore(meta["guard"])
            current = nnx.merge_state(state.params, frozen)
            say(f"going on from step {first}")
        run.start_at(BEFORE if first is None else first)
        if first is None:
            scalars = _evaluate(development, current, 0, folder, run, say)
            checkpoints.save(0, state.params, state.optimizer, meta, score=scalars.get(BEST_BY))
            checkpoints.wait()
        step, saving = first or 0, 0.0

        def stop_waiting(at: int) -> None:
            request.stop_waiting(folder, at)

        follower.start()
        index = open_initial_index(
            follower,
            schedule,
            step,
            meta["index_version"],
            allow_other=allow_change,
            on_wait=lambda: stop_waiting(step),
        )
        environment = make_environment(config, index, encode_documents)
        moving = MovingIndex(
            config.index,
            folder,
            follower,
            environment,
            encode_documents,
            schedule=schedule,
            needed=needed,
            swaps=meta["swaps"],
            index_versions=meta["index_versions"],
            say=say,
            on_wait=stop_waiting,
        )
        if arrays and index.version == meta["index_version"]:
            environment.restore(arrays)
            moving.restore(arrays)
        else:
            moving.checkpoint_saved()

        def save(values: dict[str, float] | None = None) -> None:
            run.make_durable()
            meta["index_version"] = environment.index.version
            kept = environment.state() | moving.state()
            checkpoints.save(
                step, state.params, state.optimizer, meta, arrays=kept, score=(values or {}).get(BEST_BY)
            )

        def save_for_index() -> None:
            if step != checkpoints.latest():
                moving.checkpoint_saved()
                save()
                checkpoints.wait()

        def unfinished() -> bool:
            return step < rl.steps or (
                len(meta["swaps"]) < rl.min_swaps and step < rl.steps + rl.max_extra_steps
            )

        # Act 3: the loop. Swaps happen between steps only.
        while unfinished():
            started = time.perf_counter()
            current = nnx.merge_state(state.params, frozen)
            stalls = moving.before_step(step, save_for_index)
            swapped = time.perf_counter()

            # Rollout: G replies to each of Q queries, with the parameters as they are.
            chosen = shuffled(
                len(collection.queries), config.seed, step * rl.global_queries, rl.global_queries
            )
            queries = [collection.queries[i] for i in chosen]
            texts = [query.text for query in queries]
            seeds = rollout_seeds(config.seed, step, chosen, rl.group_size)
            rollout = sampler.sample(current, texts, seeds, max_tokens=config.text.max_query_tokens)
            rollout = dataclasses.replace(rollout, valid=rollout.valid & (rollout.lengths >= rl.min_tokens))
            sampled = time.perf_counter()

            # Reward: candidates from the index, the region they touch under current parameters.
            Q, G = seeds.shape
            positives = [_positives(query, collection) for query in queries]
            vectors, embedding = rollout.vectors, current
            if config.index.scoring == "consistent_stale":
                embedding = nnx.merge_state(moving.checkpoint_params(state.params), frozen)
                vectors = reencode_rollout(
                    reasoned_encoder, embedding, texts, rollout, config.text.max_query_tokens
                )
            direct = rl.reward == "gain_over_direct"
            result = environment.score(
                step,
                positives,
                vectors.reshape(Q, G, -1),
                rollout.valid.reshape(Q, G),
                tokens=rollout.lengths.reshape(Q, G),
                direct=encoder.encode(embedding, texts, max_tokens=config.text.max_query_tokens)
                if direct
                else None,
            )
            rewarded = time.perf_counter()

            # Update: advantages of the whole batch, then as many passes over it as asked for.
            group_id = jnp.repeat(jnp.arange(Q), G)
            advantages, _ = group_advantages(
                jnp.asarray(result.rewards).reshape(-1), group_id, groups=Q, scale=rl.scale_rewards
            )
            candidates = (
                environment.unlike(positives, result.candidates, rl.near_duplicate_cosine)
                if rl.near_duplicate_cosine < 1
                else result.candidates
            )
            document_rows = infonce_document_rows(
                positives, candidates, rl.infonce_negatives, rows=len(collection.documents)
            )
            relevance = np.array(
                [[grades.get(row, 0) for row in document_rows.tolist()] for grades in positives], np.float32
            )
            documents, own = environment.vectors_of(document_rows), None
            if rl.infonce_train_documents:
                bodies = [collection.documents[row].body for row in document_rows[:Q].tolist()]
                own = tokenize_documents(prompter, bodies, config.text.max_document_tokens)
            batch = make_batch(
                rollout, np.asarray(advantages), documents, relevance, own=own, micro_queries=rl.micro_queries
            )
            batch = put_batch(batch, model.mesh)
            reference = _reference(score, batch, params, frozen, config)
            old = score(state.params, frozen, batch.replies, adapters=True) if rl.inner_epochs > 1 else None
            found: dict[str, jax.Array] = {}
            log_probs: list[jax.Array] = []
            for _ in range(rl.inner_epochs):
                state, found, before = update(state, frozen, batch, old, reference)
                log_probs.append(before)
            values = {name: float(value) for name, value in found.items()}
            meta["skipped_in_a_row"] = int(values.pop("skipped_in_a_row"))
            meta["skipped"] += meta["skipped_in_a_row"] > 0
            finished = time.perf_counter()

            # What came of it.
            trainer_bt = np.asarray(log_probs[0]).reshape(rollout.ids.shape)
            values |= step_scalars(rollout, result, trainer_bt, sampled - swapped)
            values |= {
                "skipped": meta["skipped"],
                "seconds": finished - started,
                **stalls,
                "save_seconds": saving,
                "rollout_seconds": sampled - swapped,
                "environment_seconds": rewarded - sampled,
                "update_seconds": finished - rewarded,
            }
            constant.observe(step, values)
            meta["reencoded"] += int(result.stats["reencoded"])
            meta["valid"].append(values["valid_rate"])
            for record in sample_records(
                step, rl.sample_every, queries, rollout, result, prompter, collection
            ):
                run.sample(record)
            step += 1
            current = nnx.merge_state(state.params, frozen)
            looked = rl.eval_every > 0 and (step % rl.eval_every == 0 or step == rl.steps)
            if looked:
                values |= _evaluate(development, current, step, folder, run, say)
            drifted, drift = moving.drifted(step)
            values |= drift
            run.log(step - 1, values)
            on_step(step, rl.steps, values)
            stop = _reason_to_stop(step - 1, values, meta, guard, rl)
            asked, saving = request.asked(), 0.0
            due = looked or drifted or step % rl.save_every == 0 or step == rl.steps
            if due:
                moving.checkpoint_saved()
            if due or stop or asked:
                started = time.perf_counter()
                save(values)
                saving = time.perf_counter() - started
            if stop:
                raise UserError(f"{stop} (checkpoints are in {folder})")
            if asked and unfinished():
                checkpoints.wait()
                request.stop(folder, step)
            checkpoints.check()
            follower.check()
        if step > (checkpoints.latest() or 0):
            save()
    recent = meta["valid"][-max(1, len(meta["valid"]) // 4) :]
    return RlResult(
        params=state.params,
        steps=step,
        swaps=[(at, version) for at, version in meta["swaps"]],
        valid_rate=float(np.mean(recent)),
        reencoded_share=meta["reencoded"] / max(1, step) / len(collection.documents),
        index_versions=meta["index_versions"],
    )


def _reference(
    score: Scorer, batch: RlBatch, start: nnx.State, frozen: nnx.State, config: RunConfig
) -> jax.Array | None:
    """Log-probabilities under the model that stage 2 started from: the base under adapters, else the
    parameters it began with."""
    if config.rl.beta == 0:
        return None
    return score(start, frozen, batch.replies, adapters=config.lora.rank == 0)


def _evaluate(
    development: Development | None, state: nnx.State, step: int, folder: Path, run: Run, say: Say
) -> dict[str, float]:
    """Scalars of the development queries, direct and reasoned; {} where nothing is watched."""
    if development is None:
        return {}
    scalars, samples = development.evaluate(state, step, folder)
    for sample in samples:
        run.sample({"step": step - 1, **sample})
    probe = (
        f"; with another query's reasoning {-scalars['dev_swap_gain']:+.3f}"
        if "dev_swap_gain" in scalars
        else ""
    )
    say(
        f"step {step}: nDCG@10 {scalars['dev_direct_ndcg@10']:.3f} direct, {scalars[BEST_BY]:.3f} reasoned "
        f"({scalars['dev_reason_valid_rate']:.0%} valid, {scalars['dev_reason_reply_tokens']:.0f} tokens and "
        f"{scalars['dev_reason_milliseconds_per_query']:.0f} ms a query{probe})"
    )
    return scalars


def _reason_to_stop(
    step: int, values: dict[str, float], meta: dict[str, Any], guard: CollapseGuard, rl: RlConfig
) -> str:
    """Why the run cannot go on, or nothing; counts the step."""
    try:
        guard.observe(step, valid_rate=values["valid_rate"], entropy=values["entropy"])
    except UserError as error:
        return str(error)
    finally:
        meta["guard"] = guard.state()
    if meta["skipped_in_a_row"] >= rl.max_skipped * rl.inner_epochs:
        return (
            f"rl.optimizer.learning_rate: step {step}: {rl.max_skipped} steps in a row were not finite; "
            "lower the rate"
        )
    return ""


def _positives(query: Query, collection: Collection) -> dict[int, int]:
    return {collection.row_of[doc_id]: grade for doc_id, grade in query.positives.items()}
