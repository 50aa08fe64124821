"""Stage 1: supervised contrastive fine-tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from search_r3_jax.config import RunConfig, SftConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.key_terms import KeyTerms
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PairBatch, PairPipeline, TextChunks
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.hub.snapshots import SnapshotWriter
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.embedding import unit
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.contrastive import Loss, exclusions, info_nce, matryoshka, triplet_margin
from search_r3_jax.objectives.grad_cache import cached_value_and_grad
from search_r3_jax.objectives.language import Head, cross_entropy, kl_to_base, token_log_probs
from search_r3_jax.rollout.encoder import both_prefixes
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.development import Development
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.own_reasoning import with_own_reasoning
from search_r3_jax.training.run import Run
from search_r3_jax.training.throughput import Throughput, peak_flops

BEST_BY = "dev_direct_ndcg@10"
Say = Callable[[str], object]
OnStep = Callable[[int, int, dict[str, float]], object]


class SftState(NamedTuple):
    """What a step changes; a plain pytree. `skipped` [] int32: steps in a row that were not finite and changed nothing."""

    params: Any
    optimizer: Any
    skipped: jax.Array


def train_sft(
    config: RunConfig,
    folder: Path,
    sets: Sequence[TrainingSet],
    model: LoadedModel,
    on_step: OnStep,
    *,
    say: Say,
) -> nnx.State:
    """Run stage 1 to its last step, from the newest checkpoint where there is one; returns the trained parameters.

    `on_step(steps done, steps in all, scalars)`. Raises UserError when too many steps in a row were not finite.
    """
    # Act 1: what is needed.
    sft = config.sft
    _check(config, sets)
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [each.train for each in sets], prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    state = SftState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    # Under LoRA the base itself is the reference; full fine-tuning keeps a copy of where it began.
    reference = params if sft.kl_weight > 0 and config.lora.rank == 0 else None
    step_function = make_step(graph, prompter, optimizer, sft)
    throughput = Throughput(model=model.decoder.config, lora=config.lora, peak=peak_flops(), with_base=sft.kl_weight > 0)
    development = _make_development(config, sets, model, prompter)

    # Act 2: the run directory, and where to begin.
    data = [{"name": s.train.name, "split": s.train.split, "corpus_hash": s.train.corpus_hash()} for s in sets]
    run = Run(folder, config, stage="sft", extra={"data": data})
    run.save_tokenizer(model.tokenizer)
    if sft.reasoning == "self":
        pipeline = _own_reasoning(config, folder, pipeline, model, say)
    snapshots = SnapshotWriter(folder, keep=sft.keep)
    skipped = 0
    try:
        first = snapshots.latest() or 0
        if first:
            restored, optimizer_state, meta = snapshots.restore(first, state.params, state.optimizer)
            state = SftState(restored, optimizer_state, jnp.asarray(meta["skipped_in_a_row"], jnp.int32))
            skipped = meta["skipped"]
            say(f"going on from step {first}")
        elif development is not None:
            scalars, _ = development.evaluate(nnx.merge_state(state.params, frozen), 0, folder)
            say(f"before training: {_told(scalars)}")
        run.start_at(first)

        # Act 3: the loop.
        batch = pipeline.batch(first)
        for step in range(first, sft.steps):
            started = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(config.seed), step) if config.lora.dropout > 0 else None
            state, found = step_function(state, frozen, batch, reference, key)
            # The host packs the next batch while the device computes this one.
            following = pipeline.batch(step + 1)
            values = {name: float(value) for name, value in found.items()}
            in_a_row = int(values.pop("skipped_in_a_row"))
            skipped += in_a_row > 0
            values |= {"skipped": skipped, "padding_share": batch.padding_share(), "seconds": time.perf_counter() - started}
            values |= throughput.of(batch.queries, batch.documents, values["seconds"])
            batch, done = following, step + 1

            looked = development is not None and sft.eval_every > 0 and (done % sft.eval_every == 0 or done == sft.steps)
            if development is not None and looked:
                scalars, samples = development.evaluate(nnx.merge_state(state.params, frozen), done, folder)
                values |= scalars
                for sample in samples:
                    run.sample({"step": step, **sample})
                say(f"step {done}: {_told(scalars)}")
            run.log(step, values)
            on_step(done, sft.steps, values)
            if looked or done % sft.save_every == 0 or done == sft.steps or in_a_row >= sft.max_skipped:
                meta = {"stage": "sft", "seed": config.seed, "skipped": skipped, "skipped_in_a_row": in_a_row}
                snapshots.save(done, state.params, state.optimizer, meta, score=values.get(BEST_BY))
            if in_a_row >= sft.max_skipped:
                raise UserError(
                    f"sft.optimizer.learning_rate: step {step}: {in_a_row} steps in a row were not finite; lower the rate, and "
                    f"give another --run (the last good parameters are in {folder})"
                )
    finally:
        snapshots.close()
        run.close()
    return state.params


def _check(config: RunConfig, sets: Sequence[TrainingSet]) -> None:
    """Raises UserError where the settings do not fit each other or the data."""
    sft = config.sft
    pairs = sum(len(query.positives) for each in sets for query in each.train.queries)
    if sft.global_batch > pairs:
        raise UserError(f"sft.global_batch: {sft.global_batch}: there are {pairs} pairs to train on; give that many or fewer")
    if sft.encode_chunk < 0 or (sft.encode_chunk and sft.global_batch % sft.encode_chunk):
        raise UserError(f"sft.encode_chunk: {sft.encode_chunk}: does not divide sft.global_batch {sft.global_batch}; 0 is the whole batch")
    if sft.reasoning == "column" and sft.reasoned_share > 0:
        for each in sets:
            for query in each.train.queries:
                if query.positives and not query.reasoning:
                    raise UserError(
                        f"sft.reasoning: column: {each.train.name}, query {query.query_id!r} has no reasoning; "
                        "give it one in the data set, or choose key_terms or self"
                    )


def make_pipeline(config: RunConfig, collections: Sequence[Collection], prompter: Prompter) -> PairPipeline:
    """The batches of stage 1."""
    sft = config.sft
    chunk = sft.encode_chunk or sft.global_batch
    return PairPipeline(
        mixture=Mixture(collections=tuple(collections), weights=config.data.weights, seed=config.seed),
        prompter=prompter,
        global_batch=sft.global_batch,
        encode_chunk=chunk,
        max_query_tokens=config.text.max_query_tokens,
        max_document_tokens=config.text.max_document_tokens,
        max_thought_tokens=config.text.max_thought_tokens,
        reasoned=round(sft.reasoned_share * chunk) if sft.reasoning != "off" else 0,
        negatives=sft.negatives,
        key_terms=tuple(KeyTerms(each, count=sft.key_terms) for each in collections) if sft.reasoning == "key_terms" else (),
    )


def _own_reasoning(
    config: RunConfig, folder: Path, pipeline: PairPipeline, model: LoadedModel, say: Callable[[str], object]
) -> PairPipeline:
    """The pipeline with the model's own text as the reasoning of just the queries that are trained in the reasoned format."""
    wanted = {(pair.set, pair.query) for step in range(config.sft.steps) for pair in pipeline.reasoned_pairs(step)}
    collections = with_own_reasoning(
        config,
        folder / "own_reasoning.jsonl",
        pipeline.mixture.collections,
        wanted,
        model,
        lambda done, total: say(f"the model writes its own reasoning: {done}/{total} queries"),
    )
    return dataclasses.replace(pipeline, mixture=dataclasses.replace(pipeline.mixture, collections=collections))


def _make_development(config: RunConfig, sets: Sequence[TrainingSet], model: LoadedModel, prompter: Prompter) -> Development | None:
    collections = [each.dev for each in sets if each.dev is not None]
    if not collections or config.sft.eval_every == 0:
        return None
    reasoned = config.sft.reasoning != "off" and config.sft.reasoned_share > 0
    return Development(config, collections, nnx.split(model.decoder)[0], prompter, reasoned=reasoned)


def _told(scalars: dict[str, float]) -> str:
    """What a reader wants to know of an evaluation."""
    told = f"nDCG@10 {scalars[BEST_BY]:.3f} direct"
    if "dev_reason_ndcg@10" in scalars:
        told += f", {scalars['dev_reason_ndcg@10']:.3f} reasoned ({scalars['dev_reason_valid_rate']:.0%} valid)"
    return told


def make_step(
    graph: nnx.GraphDef[Decoder], prompter: Prompter, optimizer: optax.GradientTransformation, config: SftConfig
) -> Callable[..., tuple[SftState, dict[str, jax.Array]]]:
    """One jitted update `(state, frozen, batch, reference=None, dropout_key=None) → (state, scalars)` of the trainable parameters.

    `reference` are the starting values of the trainable parameters, for the KL term of full fine-tuning; under LoRA the base is at hand.
    """

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
            vectors = unit(hidden_md[chunk.embed_at])
            if not chunk.reply_at.shape[0]:
                return vectors, {name: jnp.zeros(()) for name in ("language", "reply_tokens", "kl")}
            # The reply's tokens, each predicted by the state before it; the head runs nowhere else.
            mask_m, reply_at = jnp.asarray(chunk.reply_at) >= 0, jnp.maximum(chunk.reply_at, 1)
            read_md = hidden_md[reply_at - 1]
            log_probs, _ = token_log_probs(decoder.logits, read_md, chunk.ids.reshape(-1)[reply_at])
            language, count = cross_entropy(log_probs, mask_m)
            sums = {"language": language, "reply_tokens": count, "kl": jnp.zeros(())}
            if config.kl_weight > 0:
                base_md = jax.lax.stop_gradient(_hidden(base, prompter, chunk, adapters=False))[reply_at - 1]
                sums["kl"], _ = kl_to_base(read_md, _head(decoder), base_md, _head(base, adapters=False), mask_m)
            return vectors, sums

        def loss(sums: dict[str, jax.Array], queries_be: jax.Array, documents_pe: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            contrast, triplet, scalars = contrastive_losses(queries_be, documents_pe, batch, config)
            scalars |= {name: sums[name] / jnp.maximum(sums["reply_tokens"], 1) for name in ("language", "kl")}
            total = config.infonce_weight * contrast + config.triplet_weight * triplet
            total += config.language_weight * scalars["language"] + config.kl_weight * scalars["kl"]
            return total, {"loss": total} | scalars

        return cached_value_and_grad(encode, loss)(params, batch.queries, batch.documents)

    @jax.jit
    def step(
        state: SftState,
        frozen: nnx.State,
        batch: PairBatch,
        reference: nnx.State | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[SftState, dict[str, jax.Array]]:
        batch = jax.tree.map(jnp.asarray, batch)
        (value, scalars), gradients = loss_and_gradient(state.params, frozen, batch, reference, dropout_key)
        scalars["gradient_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(scalars["gradient_norm"])
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, optimizer_state), (state.params, state.optimizer)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return SftState(params, optimizer_state, skipped), scalars | {"skipped_in_a_row": skipped}

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
    return hidden.reshape(-1, hidden.shape[-1])


def _head(decoder: Decoder, *, adapters: bool = True) -> Head:
    """What makes logits of a decoder's hidden states, as `Decoder.logits` does."""
    weight, vocab_axis, row = (
        (decoder.embedding[...], 0, decoder.embed_row) if decoder.head is None else (decoder.head[...], 1, decoder.head_row)
    )
    if not adapters or row is None or decoder.embed_id is None:
        return Head(weight=weight, vocab_axis=vocab_axis)
    return Head(weight=weight, vocab_axis=vocab_axis, row_d=row[...], row_id=decoder.embed_id)
