"""Stage 1: supervised contrastive fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from search_r3_jax.config import RunConfig, SftConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.key_terms import KeyTerms
from search_r3_jax.data.pipeline import PairBatch, PairPipeline
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.hub.snapshots import SnapshotWriter
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.embedding import unit
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.contrastive import info_nce, one_positive
from search_r3_jax.objectives.language import cross_entropy, token_log_probs
from search_r3_jax.rollout.encoder import both_prefixes
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.run import Run

OnStep = Callable[[int, int, dict[str, float]], object]


class SftState(NamedTuple):
    """What a step changes; a plain pytree."""

    params: Any
    optimizer: Any


def train_sft(config: RunConfig, folder: Path, collection: Collection, model: LoadedModel, on_step: OnStep) -> nnx.State:
    """Run stage 1 to its last step, from the newest checkpoint where there is one; returns the trained parameters."""
    # Act 1: what is needed.
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, collection, prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
    state = SftState(params, optimizer.init(params))
    step_function = make_step(graph, prompter, optimizer, config.sft)

    # Act 2: the run directory, and where to begin.
    run = Run(folder, config, stage="sft", extra={"data_name": collection.name})
    run.save_tokenizer(model.tokenizer)
    snapshots = SnapshotWriter(folder)
    try:
        first = snapshots.latest() or 0
        if first:
            restored, optimizer_state, _ = snapshots.restore(first, state.params, state.optimizer)
            state = SftState(restored, optimizer_state)
        run.start_at(first)

        # Act 3: the loop.
        for step in range(first, config.sft.steps):
            started = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(config.seed), step) if config.lora.dropout > 0 else None
            state, scalars = step_function(state, frozen, pipeline.batch(step), key)
            values = {name: float(value) for name, value in scalars.items()}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"stage 1, step {step}: the loss is {values['loss']}; lower sft.optimizer.learning_rate")
            values["seconds"] = time.perf_counter() - started
            run.log(step, values)
            on_step(step + 1, config.sft.steps, values)
            if (step + 1) % config.sft.save_every == 0 or step + 1 == config.sft.steps:
                snapshots.save(step + 1, state.params, state.optimizer, {"stage": "sft", "seed": config.seed})
    finally:
        snapshots.close()
        run.close()
    return state.params


def make_pipeline(config: RunConfig, collection: Collection, prompter: Prompter) -> PairPipeline:
    """The batches of stage 1."""
    use_terms = config.sft.reasoning == "key_terms" and config.sft.reasoned_share > 0
    return PairPipeline(
        collection=collection,
        prompter=prompter,
        global_batch=config.sft.global_batch,
        seed=config.seed,
        max_query_tokens=config.text.max_query_tokens,
        max_document_tokens=config.text.max_document_tokens,
        reasoned=round(config.sft.reasoned_share * config.sft.global_batch) if use_terms else 0,
        key_terms=KeyTerms(collection, count=config.sft.key_terms) if use_terms else None,
    )


def make_step(
    graph: nnx.GraphDef[Decoder], prompter: Prompter, optimizer: optax.GradientTransformation, config: SftConfig
) -> Callable[..., tuple[SftState, dict[str, jax.Array]]]:
    """One jitted update `(state, frozen, batch, dropout_key=None) → (state, scalars)` of the trainable parameters."""

    def loss_of(params: nnx.State, frozen: nnx.State, batch: PairBatch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        decoder = nnx.merge(graph, params, frozen)
        hidden, _ = decoder(
            jnp.asarray(batch.ids),
            jnp.asarray(batch.positions),
            segments_bt=jnp.asarray(batch.segments),
            contexts=[both_prefixes(decoder, prompter)],
            context_segments_bt=jnp.asarray(batch.prefixes),
            dropout_key=key,
        )
        hidden_md = hidden.reshape(-1, hidden.shape[-1])
        vectors = unit(hidden_md[batch.embed_at])
        queries, documents = jnp.split(vectors, [batch.positive.shape[0]])
        relevance = one_positive(jnp.asarray(batch.positive), documents.shape[0])
        contrast_sum, contrast_count, named = info_nce(
            queries, documents, relevance, jnp.asarray(batch.excluded), temperature=config.temperature
        )

        # L_SFT: the reply's tokens, each predicted by the state before it; the head runs nowhere else.
        reply_at = jnp.maximum(jnp.asarray(batch.reply_at), 1)
        log_probs, _ = token_log_probs(decoder.logits, hidden_md[reply_at - 1], jnp.asarray(batch.ids).reshape(-1)[reply_at])
        language_sum, language_count = cross_entropy(log_probs, jnp.asarray(batch.reply_at) >= 0)
        contrast, language = contrast_sum / contrast_count, language_sum / language_count
        loss = config.infonce_weight * contrast + config.language_weight * language
        return loss, {"loss": loss, "infonce": contrast, "language": language, "in_batch_accuracy": named["hits"] / contrast_count}

    @jax.jit
    def step(
        state: SftState, frozen: nnx.State, batch: PairBatch, dropout_key: jax.Array | None = None
    ) -> tuple[SftState, dict[str, jax.Array]]:
        gradients, scalars = jax.grad(loss_of, has_aux=True)(state.params, frozen, batch, dropout_key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        scalars["gradient_norm"] = optax.tree.norm(gradients)
        return SftState(optax.apply_updates(state.params, updates), optimizer_state), scalars

    return step
