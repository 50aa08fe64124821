"""Stage 2: GRPO on retrieval success, against an index that is rebuilt while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from search_r3_jax.config import RlConfig, RunConfig
from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.mixture import shuffled
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.hub.snapshots import SnapshotWriter
from search_r3_jax.models.attention import KVBlock
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.embedding import unit
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.contrastive import info_nce, one_positive
from search_r3_jax.objectives.language import token_log_probs
from search_r3_jax.objectives.policy_gradient import group_advantages, policy_loss
from search_r3_jax.retrieval.environment import Environment, StepResult
from search_r3_jax.retrieval.rewards import RewardSettings, check_rewards
from search_r3_jax.retrieval.supervisor import IndexFollower
from search_r3_jax.rollout.encoder import Encoder, prefix_block
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.run import Run

OnStep = Callable[[int, int, dict[str, float]], object]


class RlState(NamedTuple):
    """What an update changes; a plain pytree."""

    params: Any
    optimizer: Any


class RlBatch(NamedTuple):
    """Q prompts, their B = Q·G replies and what an update needs of the rewards.

    `read` [M] int32: flat positions of B·T whose token the policy chose, −1 filled; everything that scores tokens is [M].
    `row` [M] int32: the reply each belongs to. `documents` [Q,E] float32: a positive of each query, under current parameters.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    valid: np.ndarray
    read: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    documents: np.ndarray


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
    collection: Collection,
    model: LoadedModel,
    on_step: OnStep,
    *,
    say: Callable[[str], object],
    extra: dict[str, Any],
) -> RlResult:
    """Run stage 2 to its last step, from the newest checkpoint where there is one.

    `model` holds the parameters that stage 1 left; `extra` is what the indexer process has to know (data set, start).
    """
    # Act 1: what is needed.
    rl = config.rl
    _check(config, collection)
    prompter = Prompter(model.tokenizer)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(rl.optimizer, rl.steps)
    state = RlState(params, optimizer.init(params))
    full_graph, _ = nnx.split(model.decoder)
    encoder = Encoder(full_graph, prompter)
    sampler = Sampler(
        full_graph,
        prompter,
        max_think_tokens=rl.sampler.max_think_tokens,
        temperature=rl.sampler.temperature,
        top_k=rl.sampler.top_k,
        top_p=rl.sampler.top_p,
        prefill_chunk=rl.sampler.prefill_chunk,
    )
    score = make_scorer(graph, prompter, rl)
    update = make_update(graph, prompter, optimizer, rl)

    # Act 2: the run directory, the first snapshot, and the index made from it by the indexer process.
    run = Run(folder, config, stage="rl", extra=extra)
    run.save_tokenizer(model.tokenizer)
    snapshots = SnapshotWriter(folder)
    follower = IndexFollower(folder, collection.corpus_hash(), model.embed_id, say=say)
    try:
        first = snapshots.latest() or 0
        meta: dict[str, Any] = {
            "stage": "rl",
            "seed": config.seed,
            "swaps": [],
            "index_versions": [],
            "reencoded": 0,
            "valid": [],
        }
        if first:
            restored, optimizer_state, meta = snapshots.restore(first, state.params, state.optimizer)
            state = RlState(restored, optimizer_state)
        elif snapshots.latest() is None:
            snapshots.save(0, state.params, state.optimizer, meta)
            snapshots.wait()
        run.start_at(first)
        follower.start()

        current = state

        def encode_documents(rows: np.ndarray) -> np.ndarray:
            texts = [collection.documents[int(row)].body for row in rows]
            whole = nnx.merge_state(current.params, frozen)
            return encoder.encode(whole, texts, max_tokens=config.text.max_document_tokens)

        index = follower.wait_for_first()
        if index.version not in [version["step"] for version in meta["index_versions"]]:
            meta["index_versions"].append(follower.measured(index.version))
        environment = Environment(
            index,
            encode_documents,
            candidates=config.index.candidates,
            refresh_budget=config.index.refresh_budget,
            overlay_max_age=config.index.overlay_max_age,
            reward=RewardSettings(
                variant=rl.reward,
                temperature=rl.reward_temperature,
                margin_weight=rl.margin_weight,
                margin_width=rl.margin_width,
                hard_negatives=rl.hard_negatives,
                floor_gap=rl.floor_gap,
            ),
        )

        # Act 3: the loop. Swaps happen between steps only.
        step = first
        while step < rl.steps or (len(meta["swaps"]) < rl.min_swaps and step < rl.steps + rl.max_extra_steps):
            started = time.perf_counter()
            newer = follower.newer_than(environment.index.version)
            if newer is not None:
                environment.swap(newer)
                meta["swaps"].append([step, newer.version])
                meta["index_versions"].append(follower.measured(newer.version))
                say(f"step {step}: the index built from step {newer.version} is in use")
            swapped = time.perf_counter()

            chosen = shuffled(len(collection.queries), config.seed, step * rl.global_queries, rl.global_queries)
            queries = [collection.queries[i] for i in chosen]
            seeds = rollout_seeds(config.seed, step, chosen, rl.group_size)
            whole = nnx.merge_state(state.params, frozen)
            texts = [query.text for query in queries]
            rollout = sampler.sample(whole, texts, seeds, max_tokens=config.text.max_query_tokens)
            sampled = time.perf_counter()

            current = state
            Q, G = seeds.shape
            result = environment.score(
                step,
                [_positives(query, collection) for query in queries],
                rollout.vectors.reshape(Q, G, -1),
                rollout.valid.reshape(Q, G),
            )
            rewarded = time.perf_counter()

            advantages, _ = group_advantages(
                jnp.asarray(result.rewards).reshape(-1), jnp.repeat(jnp.arange(Q), G), groups=Q, scale=rl.scale_rewards
            )
            documents = environment.vectors_of(np.array([_first_positive(query, collection) for query in queries]))
            batch = make_batch(rollout, np.asarray(advantages), documents)
            reference = score(state.params, frozen, batch, adapters=False) if rl.beta > 0 else None
            state, scalars = update(state, frozen, batch, reference)
            values = {name: float(value) for name, value in scalars.items()}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"stage 2, step {step}: the loss is {values['loss']}; lower rl.optimizer.learning_rate")
            finished = time.perf_counter()

            values |= _rollout_scalars(rollout, result) | {name: float(value) for name, value in result.stats.items()}
            values |= {
                "seconds": finished - started,
                "swap_seconds": swapped - started,
                "rollout_seconds": sampled - swapped,
                "environment_seconds": rewarded - sampled,
                "update_seconds": finished - rewarded,
            }
            meta["reencoded"] += int(result.stats["reencoded"])
            meta["valid"].append(values["valid_rate"])
            run.log(step, values)
            run.sample(_sample_record(step, queries[0], rollout, result, prompter, collection))
            step += 1
            on_step(step, rl.steps, values)
            if step % rl.snapshot_every == 0 or step == rl.steps:
                snapshots.save(step, state.params, state.optimizer, meta)
            follower.check()
        if step > (snapshots.latest() or 0):
            snapshots.save(step, state.params, state.optimizer, meta)
    finally:
        follower.stop()
        snapshots.close()
        run.close()
    recent = meta["valid"][-max(1, len(meta["valid"]) // 4) :]
    return RlResult(
        params=state.params,
        steps=step,
        swaps=[(at, version) for at, version in meta["swaps"]],
        valid_rate=float(np.mean(recent)),
        reencoded_share=meta["reencoded"] / max(1, step) / len(collection.documents),
        index_versions=meta["index_versions"],
    )


def make_batch(rollout: Rollout, advantages: np.ndarray, documents: np.ndarray) -> RlBatch:
    """The arrays of an update, in one shape whatever was sampled: compiling another would cost more than a short run's steps."""
    chosen = np.flatnonzero(rollout.sampled.reshape(-1))
    read = np.full(rollout.sampled.size, -1, dtype=np.int32)
    read[: len(chosen)] = chosen
    old = np.zeros(len(read), dtype=np.float32)
    old[: len(chosen)] = rollout.log_probs.reshape(-1)[chosen]
    return RlBatch(
        prompt_ids=rollout.prompt_ids,
        prompt_lengths=rollout.prompt_lengths,
        ids=rollout.ids,
        lengths=rollout.lengths,
        valid=rollout.valid,
        read=read,
        old_log_probs=old,
        advantages=advantages.astype(np.float32),
        documents=documents.astype(np.float32),
    )


def _reply_states(
    decoder: Decoder, prompter: Prompter, batch: RlBatch, *, temperature: float, adapters: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [M] and entropies [M] of the sampled tokens, and the states [B,D] at the embed token.

    Prefix and prompt run once per query and are shared by the group, with gradients; the replies attend to them.
    """
    prompt, (B, T) = prompter.reason, batch.ids.shape
    lengths_q = jnp.asarray(batch.prompt_lengths)
    G = B // lengths_q.shape[0]
    shared: KVBlock = prefix_block(decoder, prompt.prefix, adapters=adapters)
    positions_qs = positions_from_lengths(lengths_q, batch.prompt_ids.shape[1], len(prompt.prefix))
    prompt_hidden, prompts = decoder(jnp.asarray(batch.prompt_ids), positions_qs, contexts=[shared], adapters=adapters)
    last_qd = jnp.take_along_axis(prompt_hidden, lengths_q[:, None, None] - 1, axis=1)[:, 0]
    lengths_b = jnp.asarray(batch.lengths)
    positions_bt = positions_from_lengths(lengths_b, T, jnp.repeat(lengths_q + len(prompt.prefix), G))
    ids_bt = jnp.asarray(batch.ids)
    hidden_btd, _ = decoder(ids_bt, positions_bt, contexts=[shared, prompts], adapters=adapters)

    # The state that predicts token t is the one before it; the first is predicted by the prompt's last state.
    predicting = jnp.concatenate([jnp.repeat(last_qd, G, axis=0)[:, None], hidden_btd[:, :-1]], axis=1)
    at_m = jnp.maximum(jnp.asarray(batch.read), 0)
    D = predicting.shape[-1]
    log_probs, entropies = token_log_probs(
        lambda hidden: decoder.logits(hidden, adapters),
        predicting.reshape(-1, D)[at_m],
        ids_bt.reshape(-1)[at_m],
        temperature=temperature,
    )
    embeds = jnp.take_along_axis(hidden_btd, (lengths_b - 1)[:, None, None], axis=1)[:, 0]
    return log_probs, entropies, embeds


def make_scorer(graph: nnx.GraphDef[Decoder], prompter: Prompter, config: RlConfig) -> Callable[..., jax.Array]:
    """Log-probabilities [M] of a batch's sampled tokens; `adapters=False` scores them with the frozen base."""

    def score(params: nnx.State, frozen: nnx.State, batch: RlBatch, adapters: bool) -> jax.Array:
        decoder = nnx.merge(graph, params, frozen)
        temperature = config.sampler.temperature
        return _reply_states(decoder, prompter, batch, temperature=temperature, adapters=adapters)[0]

    return jax.jit(score, static_argnames="adapters")


def make_update(
    graph: nnx.GraphDef[Decoder], prompter: Prompter, optimizer: optax.GradientTransformation, config: RlConfig
) -> Callable[[RlState, nnx.State, RlBatch, jax.Array | None], tuple[RlState, dict[str, jax.Array]]]:
    """One jitted policy update."""

    def loss_of(params: nnx.State, frozen: nnx.State, batch: RlBatch, reference_m: jax.Array | None):
        decoder = nnx.merge(graph, params, frozen)
        temperature = config.sampler.temperature
        log_probs_m, entropies_m, embeds_bd = _reply_states(decoder, prompter, batch, temperature=temperature, adapters=True)
        B, T = batch.ids.shape
        read = jnp.asarray(batch.read)

        def to_rows(values_m: jax.Array) -> jax.Array:
            # Fillers go one past the end, where `drop` discards them.
            return jnp.zeros(B * T).at[jnp.where(read >= 0, read, B * T)].set(values_m, mode="drop").reshape(B, T)

        policy_sum, count, statistics = policy_loss(
            to_rows(log_probs_m),
            jnp.asarray(batch.advantages),
            to_rows(jnp.ones_like(log_probs_m)) > 0,
            variant=config.variant,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            max_tokens=config.sampler.max_think_tokens,
            old_log_probs_bt=to_rows(jnp.asarray(batch.old_log_probs)),
            reference_log_probs_bt=None if reference_m is None else to_rows(reference_m),
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            entropies_bt=to_rows(entropies_m),
        )
        policy = policy_sum / jnp.maximum(count, 1)
        Q = batch.prompt_ids.shape[0]
        positive_b = jnp.repeat(jnp.arange(Q, dtype=jnp.int32), B // Q)
        # Equal vectors mean the same document: then it is no negative.
        same_qq = jnp.all(batch.documents[:, None] == batch.documents[None], axis=-1)
        contrast_sum, contrast_count, _ = info_nce(
            unit(embeds_bd),
            jnp.asarray(batch.documents),
            one_positive(positive_b, Q),
            same_qq[positive_b],
            temperature=config.infonce_temperature,
        )
        contrast = contrast_sum / contrast_count
        scalars = statistics.scalars() | {"policy": policy, "infonce": contrast}
        loss = policy + config.infonce_weight * contrast
        return loss, {"loss": loss, **scalars}

    @jax.jit
    def update(state: RlState, frozen: nnx.State, batch: RlBatch, reference: jax.Array | None):
        gradients, scalars = jax.grad(loss_of, has_aux=True)(state.params, frozen, batch, reference)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        scalars["gradient_norm"] = optax.tree.norm(gradients)
        return RlState(optax.apply_updates(state.params, updates), optimizer_state), scalars

    return update


def _check(config: RunConfig, collection: Collection) -> None:
    check_rewards(
        documents=len(collection.documents),
        candidates=config.index.candidates,
        group_size=config.rl.group_size,
        scale_rewards=config.rl.scale_rewards,
    )
    if config.rl.inner_epochs != 1 or config.rl.importance_cap > 0 or config.rl.length_weight > 0 or config.rl.reward == "gain_over_direct":
        raise UserError(
            "config: rl: leave inner_epochs, importance_cap, length_weight and reward gain_over_direct alone: this loop has none of them"
        )
    if config.lora.rank == 0 and config.rl.beta > 0:
        raise UserError("config: rl.beta: the reference is the base under LoRA; set rl.beta to 0 or lora.rank above 0")


def _positives(query: Query, collection: Collection) -> dict[int, int]:
    return {collection.row_of[doc_id]: grade for doc_id, grade in query.positives.items()}


def _first_positive(query: Query, collection: Collection) -> int:
    best = min(query.positives, key=lambda doc_id: (-query.positives[doc_id], doc_id))
    return collection.row_of[best]


def _rollout_scalars(rollout: Rollout, result: StepResult) -> dict[str, float]:
    within = result.rewards.std(axis=-1)
    return {
        "reward": float(result.rewards.mean()),
        "reward_within_group_std": float(within.mean()),
        "zero_advantage_share": float((within == 0).mean()),
        "valid_rate": float(rollout.valid.mean()),
        "reply_tokens": float(rollout.lengths.mean()),
    }


def _sample_record(
    step: int, query: Query, rollout: Rollout, result: StepResult, prompter: Prompter, collection: Collection
) -> dict[str, Any]:
    return {
        "step": step,
        "query": query.text,
        "reply": prompter.tokenizer.decode(rollout.replies()[0]),
        "valid": bool(rollout.valid[0]),
        "reward": float(result.rewards[0, 0]),
        "top": [collection.documents[int(row)].doc_id for row in result.top_rows[0, 0] if row >= 0],
    }
