"""The update of stage 1: four losses, one gradient, in the memory of one chunk and on any mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.compiler import compiler_options
from search_r3_jax.config import SftConfig
from search_r3_jax.data.pipeline import PairBatch, TextChunks
from search_r3_jax.mesh import BATCH_AXES, constrain, use_mesh
from search_r3_jax.models.decoder import Decoder, Text
from search_r3_jax.objectives.contrastive import Loss, exclusions, info_nce, matryoshka, triplet_margin
from search_r3_jax.objectives.grad_cache import cached_value_and_grad
from search_r3_jax.objectives.language import cross_entropy, kl_to_base, token_log_probs
from search_r3_jax.rollout.encoder import both_prefixes
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.head import head_chunks, head_of, states_for_head
from search_r3_jax.training.state import TrainState, updated
from search_r3_jax.vectors import l2_normalize

Pairs = tuple[TextChunks, TextChunks]
"""A chunk's queries and its documents."""


def make_step(
    graph: nnx.GraphDef[Decoder],
    prompter: Prompter,
    optimizer: optax.GradientTransformation,
    config: SftConfig,
    shardings: TrainState | None = None,
    *,
    donate: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Make the jitted update of the trainable parameters.

    Its signature: `(state, frozen, batch, reference=None, dropout_key=None) → (state, scalars)`. `reference`
    are the starting values of the trainable parameters, for the KL term of full fine-tuning; LoRA uses its
    base. On a mesh the batch comes from `put_batch`, and the new state keeps the sharding of the old one,
    `shardings`; `donate` reuses the old one's memory.
    """
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh

    def loss_and_gradient(
        params: nnx.State,
        frozen: nnx.State,
        batch: PairBatch,
        reference: nnx.State | None,
        key: jax.Array | None,
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
        base = nnx.merge(graph, params if reference is None else reference, frozen)

        def encode(
            params: nnx.State, pairs: Pairs
        ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
            """Unit vectors [N,E] of a chunk's queries and documents, and the sums of its language losses."""
            decoder = nnx.merge(graph, params, frozen)
            # The seed is the sum of a chunk's ids: dropout differs by chunk, and is the same when a chunk is
            # encoded again.
            keys = [
                None if key is None else jax.random.fold_in(key, jnp.sum(chunk.ids.astype(jnp.uint32)))
                for chunk in pairs
            ]
            # With adapters the base reads the queries in the same pass.
            with_base = config.kl_weight > 0 and reference is None
            hidden_md, of_documents_md, *base_md = _hidden(
                decoder, prompter, pairs, keys=keys, with_base=with_base
            )
            chunk, documents = pairs
            vectors = (
                constrain(l2_normalize(hidden_md[chunk.embed_at]), None),
                constrain(l2_normalize(of_documents_md[documents.embed_at]), None),
            )
            sums = _reply_losses(
                decoder, base, prompter, config, chunk, hidden_md, base_md if with_base else None, mesh
            )
            return vectors, sums

        def loss(
            sums: dict[str, jax.Array], vectors: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            queries_be, documents_pe = vectors
            contrast, triplet, scalars = contrastive_losses(queries_be, documents_pe, batch, config)
            scalars["language"] = sums["language"] / jnp.maximum(sums["reply_tokens"], 1)
            scalars["kl"] = sums["kl"] / jnp.maximum(sums["kl_tokens"], 1)
            total = config.infonce_weight * contrast + config.triplet_weight * triplet
            total += config.language_weight * scalars["language"] + config.kl_weight * scalars["kl"]
            return total, {"loss": total} | scalars

        return cached_value_and_grad(encode, loss)(params, (batch.queries, batch.documents))

    # Without out_shardings XLA may reshard a parameter: the next step would compile again and move it back.
    @partial(
        jax.jit,
        donate_argnums=0 if donate else (),
        out_shardings=None if shardings is None else (shardings, shardings.skipped),
        compiler_options=compiler_options(mesh),
    )
    def step(
        state: TrainState,
        frozen: nnx.State,
        batch: PairBatch,
        reference: nnx.State | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = jax.tree.map(jnp.asarray, batch)
        with use_mesh(mesh):
            (value, scalars), gradients = loss_and_gradient(
                state.params, frozen, batch, reference, dropout_key
            )
        state, about_update = updated(state, gradients, value, optimizer)
        return state, scalars | about_update

    return step


def _reply_losses(
    decoder: Decoder,
    base: Decoder,
    prompter: Prompter,
    config: SftConfig,
    chunk: TextChunks,
    hidden_md: jax.Array,
    base_states: Sequence[jax.Array] | None,
    mesh: Mesh | None,
) -> dict[str, jax.Array]:
    """Sums of cross-entropy and KL to the base over a chunk's replies, and their tokens.

    `base_states` are the base's hidden states where it read the queries in the same pass.
    """
    # The reply's tokens, each predicted by the state before it; the head runs nowhere else.
    mask_m, reply_at = jnp.asarray(chunk.reply_at) >= 0, jnp.maximum(chunk.reply_at, 1)
    read_md = states_for_head(hidden_md[reply_at - 1])
    states, columns = head_chunks(decoder.config.vocab_size, mesh)
    targets_m = jnp.asarray(chunk.ids).reshape(-1)[reply_at]
    head = head_of(decoder)
    log_probs, _ = token_log_probs(head.logits, read_md, targets_m, chunk=states)
    language, count = cross_entropy(log_probs, mask_m)
    sums = {
        "language": language,
        "reply_tokens": count,
        "kl": jnp.zeros(()),
        "kl_tokens": jnp.zeros(()),
    }
    if config.kl_weight > 0:
        if base_states is None:
            base_states = _hidden(base, prompter, [chunk], adapters=False)
        base_md = states_for_head(jax.lax.stop_gradient(base_states[0])[reply_at - 1])
        base_head = head_of(base, adapters=False)
        # The base has never seen the embed token: the KL term would teach the model not to write it.
        mask_m = mask_m & (targets_m != prompter.embed_id)
        sums["kl"], sums["kl_tokens"] = kl_to_base(
            read_md, head, base_md, base_head, mask_m, chunk=states, vocab_chunk=columns
        )
    return sums


def contrastive_losses(
    queries_be: jax.Array, documents_pe: jax.Array, batch: PairBatch, config: SftConfig
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """`(InfoNCE, triplet margin, scalars)` of a batch, each a mean over its queries."""
    # Every document of the batch that is known to be relevant is a positive, whichever query it came with.
    same_bpk = batch.known_ids[:, None, :] == batch.document_ids[None, :, None]
    relevance_bp = jnp.sum(
        jnp.where(same_bpk & (batch.known_ids >= 0)[:, None, :], batch.known_relevance[:, None, :], 0.0),
        axis=-1,
    )
    excluded_bp = exclusions(jnp.asarray(batch.document_ids), jnp.asarray(batch.known_ids))
    # Mined negatives are close to the positive on purpose.
    mined_bp = jnp.any(jnp.asarray(batch.mined)[:, :, None] == jnp.arange(len(batch.document_ids)), axis=1)

    def contrast(queries_be: jax.Array, documents_pe: jax.Array) -> Loss:
        return info_nce(
            queries_be,
            documents_pe,
            relevance_bp,
            excluded_bp,
            temperature=config.temperature,
            directions=config.directions,
            partition=config.partition,
            mined_bp=mined_bp,
            false_negative_margin=config.false_negative_margin,
        )

    def triplet(queries_be: jax.Array, documents_pe: jax.Array) -> Loss:
        mined = jnp.asarray(batch.mined) if config.negatives else None
        return triplet_margin(
            queries_be, documents_pe, relevance_bp, excluded_bp, margin=config.triplet_margin, mined_bk=mined
        )

    def mean(loss: Callable[..., Loss]) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, count, named = (matryoshka(loss, config.matryoshka) if config.matryoshka else loss)(
            queries_be, documents_pe
        )
        count = jnp.maximum(count, 1)
        return total / count, {name: value / count for name, value in named.items()}

    infonce, about_infonce = mean(contrast)
    scalars = {"infonce": infonce} | {
        name.replace("hits", "in_batch_accuracy"): value for name, value in about_infonce.items()
    }
    margin = jnp.zeros(())
    if config.triplet_weight > 0:
        margin, about_triplet = mean(triplet)
        scalars |= {"triplet": margin} | {f"triplet_{name}": value for name, value in about_triplet.items()}
    return infonce, margin, scalars


def _hidden(
    decoder: Decoder,
    prompter: Prompter,
    chunks: Sequence[TextChunks],
    *,
    adapters: bool = True,
    keys: Sequence[jax.Array | None] = (None,),
    with_base: bool = False,
) -> list[jax.Array]:
    """Final hidden states [R·T,D] of each chunk's packed texts, read in one pass behind shared prefixes.

    `with_base` adds those of the first chunk without adapters.
    """

    def behind(prefix: int, chunk: TextChunks, adapters: bool, key: jax.Array | None) -> Text:
        ids, positions, segments, prefixes = (
            jnp.asarray(x) for x in (chunk.ids, chunk.positions, chunk.segments, chunk.prefixes)
        )
        return Text(ids, positions, segments, (), (prefix,), prefixes, adapters, key)

    texts = [both_prefixes(prompter, adapters=adapters)]
    texts += [behind(0, chunk, adapters, key) for chunk, key in zip(chunks, keys, strict=True)]
    wanted = list(range(1, len(texts)))
    if with_base:
        texts += [both_prefixes(prompter, adapters=False), behind(len(texts), chunks[0], False, None)]
        wanted.append(len(texts) - 1)
    read = decoder.read(texts)
    return [constrain(read[i][0], BATCH_AXES).reshape(-1, read[i][0].shape[-1]) for i in wanted]
