"""Stage 1: supervised contrastive fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.config import RunConfig, SftConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.key_terms import KeyTerms
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PairBatch, PairPipeline, TextChunks
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.hub.snapshots import SnapshotWriter
from search_r3_jax.mesh import BATCH_AXES, laid
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.embedding import unit
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.contrastive import Loss, exclusions, info_nce, matryoshka, triplet_margin
from search_r3_jax.objectives.grad_cache import cached_value_and_grad
from search_r3_jax.objectives.language import Head, cross_entropy, kl_to_base, token_log_probs
from search_r3_jax.rollout.encoder import both_prefixes
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import sharding
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.run import Run

OnStep = Callable[[int, int, dict[str, float]], object]


class SftState(NamedTuple):
    """What a step changes; a plain pytree. `skipped` [] int32: steps in a row that were not finite and changed nothing."""

    params: Any
    optimizer: Any
    skipped: jax.Array


def state_shardings(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> SftState:
    """Where a state lies on a mesh, as a state of shardings: moments with their parameters, counters everywhere."""
    of_params = sharding.params_shardings(params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_map_params(
        optimizer, lambda _, own: own, jax.eval_shape(optimizer.init, params), of_params, transform_non_params=lambda _: everywhere
    )
    return SftState(of_params, moments, everywhere)


def init_state(
    params: nnx.State, optimizer: optax.GradientTransformation, shardings: SftState | None = None, *, copy: bool = False
) -> SftState:
    """The state before the first step, each array made where `shardings` wants it; `copy` leaves `params` to the caller."""
    # A donated state takes its arrays with it, which the model and the reference of the KL term still hold.
    own = jax.tree.map(jnp.copy, params) if copy else params
    if shardings is None:
        return SftState(own, optimizer.init(params), jnp.zeros((), jnp.int32))

    def start(params: nnx.State) -> tuple[Any, jax.Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32)

    return SftState(jax.device_put(own, shardings.params), *jax.jit(start, out_shardings=shardings[1:])(params))


def train_sft(config: RunConfig, folder: Path, collection: Collection, model: LoadedModel, on_step: OnStep) -> nnx.State:
    """Run stage 1 to its last step, from the newest checkpoint where there is one; returns the trained parameters."""
    # Act 1: what is needed.
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, collection, prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
    # Orbax reads the arrays of a save before it returns, except on CPU, where it writes from their own memory in the background.
    donate = jax.default_backend() != "cpu"
    shardings = None if model.mesh is None else state_shardings(params, optimizer, model.mesh)
    state = init_state(params, optimizer, shardings, copy=donate)
    # Under LoRA the base itself is the reference; full fine-tuning keeps a copy of where it began.
    reference = params if config.sft.kl_weight > 0 and config.lora.rank == 0 else None
    step_function = make_step(graph, prompter, optimizer, config.sft, shardings, donate=donate)

    # Act 2: the run directory, and where to begin.
    run = Run(folder, config, stage="sft", extra={"data_name": collection.name})
    run.save_tokenizer(model.tokenizer)
    snapshots = SnapshotWriter(folder)
    try:
        first = snapshots.latest() or 0
        if first:
            restored, optimizer_state, _ = snapshots.restore(first, state.params, state.optimizer)
            state = SftState(restored, optimizer_state, state.skipped)
        run.start_at(first)

        # Act 3: the loop.
        for step in range(first, config.sft.steps):
            started = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(config.seed), step) if config.lora.dropout > 0 else None
            batch = pipeline.batch(step)
            state, scalars = step_function(state, frozen, sharding.put_batch(batch, model.mesh), reference, key)
            values = {name: float(value) for name, value in scalars.items()}
            if values["skipped"] >= config.sft.max_skipped:
                raise FloatingPointError(
                    f"stage 1, step {step}: {config.sft.max_skipped} steps in a row were not finite; lower sft.optimizer.learning_rate"
                )
            values["padding_share"] = batch.padding_share()
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
    sft = config.sft
    chunk = sft.encode_chunk or sft.global_batch
    return PairPipeline(
        mixture=Mixture(collections=(collection,), seed=config.seed),
        prompter=prompter,
        global_batch=sft.global_batch,
        encode_chunk=chunk,
        max_query_tokens=config.text.max_query_tokens,
        max_document_tokens=config.text.max_document_tokens,
        max_thought_tokens=config.text.max_thought_tokens,
        reasoned=round(sft.reasoned_share * chunk) if sft.reasoning != "off" else 0,
        negatives=sft.negatives,
        key_terms=(KeyTerms(collection, count=sft.key_terms),) if sft.reasoning == "key_terms" else (),
    )


def make_step(
    graph: nnx.GraphDef[Decoder],
    prompter: Prompter,
    optimizer: optax.GradientTransformation,
    config: SftConfig,
    shardings: SftState | None = None,
    *,
    donate: bool = False,
) -> Callable[..., tuple[SftState, dict[str, jax.Array]]]:
    """One jitted update `(state, frozen, batch, reference=None, dropout_key=None) → (state, scalars)` of the trainable parameters.

    `reference` are the starting values of the trainable parameters, for the KL term of full fine-tuning; under LoRA the base is at hand.
    On a mesh the batch comes from `put_batch`, and the new state lies as the old one did, by `shardings`; with `donate` it also takes the
    old one's memory.
    """
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh

    def loss_and_gradient(
        params: nnx.State, frozen: nnx.State, batch: PairBatch, reference: nnx.State | None, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
        base = nnx.merge(graph, params if reference is None else reference, frozen)

        def encode(params: nnx.State, chunk: TextChunks) -> tuple[jax.Array, dict[str, jax.Array]]:
            """Unit vectors [N,E] of one chunk's texts, and the sums of the losses on its replies."""
            decoder = nnx.merge(graph, params, frozen)
            # Every chunk drops other inputs, and the same ones when it is encoded again: the sum of its ids tells it apart.
            chunk_key = None if key is None else jax.random.fold_in(key, jnp.sum(chunk.ids.astype(jnp.uint32)))
            hidden_md = _hidden(decoder, prompter, chunk, key=chunk_key)
            vectors = laid(unit(hidden_md[chunk.embed_at]), None)
            if not chunk.reply_at.shape[0]:
                return vectors, {name: jnp.zeros(()) for name in ("language", "reply_tokens", "kl")}
            # The reply's tokens, each predicted by the state before it; the head runs nowhere else.
            mask_m, reply_at = jnp.asarray(chunk.reply_at) >= 0, jnp.maximum(chunk.reply_at, 1)
            read_md = laid(hidden_md[reply_at - 1], BATCH_AXES)
            states, columns = sharding.head_chunks(decoder.config.vocab_size, mesh)
            log_probs, _ = token_log_probs(decoder.logits, read_md, chunk.ids.reshape(-1)[reply_at], chunk=states)
            language, count = cross_entropy(log_probs, mask_m)
            sums = {"language": language, "reply_tokens": count, "kl": jnp.zeros(())}
            if config.kl_weight > 0:
                base_md = jax.lax.stop_gradient(_hidden(base, prompter, chunk, adapters=False))
                base_md = laid(base_md[reply_at - 1], BATCH_AXES)
                heads = _head(decoder), _head(base, adapters=False)
                sums["kl"], _ = kl_to_base(read_md, heads[0], base_md, heads[1], mask_m, chunk=states, vocab_chunk=columns)
            return vectors, sums

        def loss(sums: dict[str, jax.Array], queries_be: jax.Array, documents_pe: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            contrast, triplet, scalars = contrastive_losses(queries_be, documents_pe, batch, config)
            scalars |= {name: sums[name] / jnp.maximum(sums["reply_tokens"], 1) for name in ("language", "kl")}
            total = config.infonce_weight * contrast + config.triplet_weight * triplet
            total += config.language_weight * scalars["language"] + config.kl_weight * scalars["kl"]
            return total, {"loss": total} | scalars

        return cached_value_and_grad(encode, loss)(params, batch.queries, batch.documents)

    # Left to XLA, a parameter may end up elsewhere than it began, and the next step would be compiled again and move it.
    @partial(jax.jit, donate_argnums=0 if donate else (), out_shardings=None if shardings is None else (shardings, shardings.skipped))
    def step(
        state: SftState,
        frozen: nnx.State,
        batch: PairBatch,
        reference: nnx.State | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[SftState, dict[str, jax.Array]]:
        batch = jax.tree.map(jnp.asarray, batch)
        with sharding.in_use(mesh):
            (value, scalars), gradients = loss_and_gradient(state.params, frozen, batch, reference, dropout_key)
        scalars["gradient_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(scalars["gradient_norm"])
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, optimizer_state), (state.params, state.optimizer)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return SftState(params, optimizer_state, skipped), scalars | {"skipped": skipped}

    return step


def contrastive_losses(
    queries_be: jax.Array, documents_pe: jax.Array, batch: PairBatch, config: SftConfig
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """`(InfoNCE, triplet margin, scalars)` of a batch, each a mean over its queries."""
    # Every document of the batch that is known to be relevant is a positive, whichever query it came with.
    same_bpk = batch.known_ids[:, None, :] == batch.document_ids[None, :, None]
    relevance_bp = jnp.sum(jnp.where(same_bpk & (batch.known_ids >= 0)[:, None, :], batch.known_relevance[:, None, :], 0.0), axis=-1)
    excluded_bp = exclusions(jnp.asarray(batch.document_ids), jnp.asarray(batch.known_ids))

    def contrast(queries_be: jax.Array, documents_pe: jax.Array) -> Loss:
        return info_nce(
            queries_be,
            documents_pe,
            relevance_bp,
            excluded_bp,
            temperature=config.temperature,
            directions=("query_to_document", "document_to_query") if config.symmetric else ("query_to_document",),
            partition="per_direction" if config.symmetric else "joint",
            false_negative_margin=config.false_negative_margin,
        )

    def triplet(queries_be: jax.Array, documents_pe: jax.Array) -> Loss:
        mined = jnp.asarray(batch.mined) if config.negatives else None
        return triplet_margin(queries_be, documents_pe, relevance_bp, excluded_bp, margin=config.triplet_margin, mined_bk=mined)

    def mean(loss: Callable[..., Loss]) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, count, named = (matryoshka(loss, config.matryoshka) if config.matryoshka else loss)(queries_be, documents_pe)
        count = jnp.maximum(count, 1)
        return total / count, {name: value / count for name, value in named.items()}

    infonce, about_infonce = mean(contrast)
    scalars = {"infonce": infonce} | {name.replace("hits", "in_batch_accuracy"): value for name, value in about_infonce.items()}
    margin = jnp.zeros(())
    if config.triplet_weight > 0:
        margin, about_triplet = mean(triplet)
        scalars |= {"triplet": margin} | {f"triplet_{name}": value for name, value in about_triplet.items()}
    return infonce, margin, scalars


def _hidden(decoder: Decoder, prompter: Prompter, chunk: TextChunks, *, adapters: bool = True, key: jax.Array | None = None) -> jax.Array:
    """Final hidden states [R·T,D] of a chunk's packed texts behind their shared prefixes."""
    hidden, _ = decoder(
        jnp.asarray(chunk.ids),
        jnp.asarray(chunk.positions),
        segments_bt=jnp.asarray(chunk.segments),
        contexts=[both_prefixes(decoder, prompter, adapters=adapters)],
        context_segments_bt=jnp.asarray(chunk.prefixes),
        adapters=adapters,
        dropout_key=key,
    )
    return laid(hidden, BATCH_AXES).reshape(-1, hidden.shape[-1])


def _head(decoder: Decoder, *, adapters: bool = True) -> Head:
    """What makes logits of a decoder's hidden states, as `Decoder.logits` does."""
    weight, vocab_axis, row = (
        (decoder.embedding[...], 0, decoder.embed_row) if decoder.head is None else (decoder.head[...], 1, decoder.head_row)
    )
    if not adapters or row is None or decoder.embed_id is None:
        return Head(weight=weight, vocab_axis=vocab_axis)
    return Head(weight=weight, vocab_axis=vocab_axis, row_d=row[...], row_id=decoder.embed_id)
