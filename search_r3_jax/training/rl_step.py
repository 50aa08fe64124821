"""The update of stage 2: policy gradient and auxiliary InfoNCE, in micro-batches, on any mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.compiler import compiler_options
from search_r3_jax.config import RlConfig
from search_r3_jax.mesh import BATCH_AXES, axis_size, constrain, use_mesh
from search_r3_jax.models.decoder import Decoder, Text, positions_from_lengths
from search_r3_jax.objectives.contrastive import info_nce
from search_r3_jax.objectives.language import masked_token_log_probs, token_log_probs
from search_r3_jax.objectives.policy_gradient import PolicyStatistics, policy_count, policy_loss
from search_r3_jax.rollout.encoder import prefix_text
from search_r3_jax.rollout.sampler import Rollout
from search_r3_jax.text.packing import bucket_length, pad_rows
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.head import head_chunks, head_of, states_for_head
from search_r3_jax.training.state import TrainState, updated
from search_r3_jax.vectors import l2_normalize

Update = Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]
Scorer = Callable[..., jax.Array]


class Replies(NamedTuple):
    """Prompts and their replies in K micro-batches of q whole groups, b = q·G rows.

    `prompt_ids` [K,q,S], `prompt_lengths` [K,q], `ids` [K,b,T], `lengths` [K,b] int32; `sampled` [K,b,T]
    bool, tokens that the policy chose; `sampler_log_probs` [K,b,T] and `advantages` [K,b] float32;
    `relevance` [K,q,P] float32, above 0 where document p is relevant.
    """

    prompt_ids: Any
    prompt_lengths: Any
    ids: Any
    lengths: Any
    sampled: Any
    sampler_log_probs: Any
    advantages: Any
    relevance: Any


class RlBatch(NamedTuple):
    """The replies of a step, and the `documents` [P,E] that InfoNCE contrasts the queries with.

    `documents` are float32 unit vectors under the current parameters. `trained_ids` [Q,S] and
    `trained_lengths` [Q] int32 are the tokens of the first Q documents, where these are trained too
    (`rl.infonce.train_documents`).
    """

    replies: Replies
    documents: Any
    trained_ids: Any = None
    trained_lengths: Any = None


class _Part(NamedTuple):
    """The sums [] that a micro-batch contributes; they add up exactly."""

    policy: jax.Array
    infonce: jax.Array
    statistics: PolicyStatistics


def make_batch(
    rollout: Rollout,
    advantages: np.ndarray,
    documents: np.ndarray,
    relevance: np.ndarray,
    *,
    trained: tuple[np.ndarray, np.ndarray] | None = None,
    micro_queries: int = 0,
) -> RlBatch:
    """Make the arrays of an update, in one shape whatever was sampled.

    `micro_queries` is the number of queries in a micro-batch; 0 means all of them. Advantages [B] are those
    of the whole batch: micro-batches hold whole groups and do not change them. `trained` are ids and lengths
    of the first Q documents, where these are trained. Raises ValueError where `micro_queries` does not divide
    the queries.
    """
    Q = len(rollout.prompt_lengths)
    q = micro_queries or Q
    if Q % q:
        raise ValueError(f"micro_queries {q} does not divide {Q} queries")

    def cut(x: np.ndarray) -> np.ndarray:
        return x.reshape(Q // q, -1, *x.shape[1:])

    replies = Replies(
        prompt_ids=rollout.prompt_ids,
        prompt_lengths=rollout.prompt_lengths,
        ids=rollout.ids,
        lengths=rollout.lengths,
        sampled=rollout.sampled,
        sampler_log_probs=rollout.log_probs,
        advantages=advantages.astype(np.float32),
        relevance=relevance.astype(np.float32),
    )
    return RlBatch(Replies(*map(cut, replies)), documents.astype(np.float32), *(trained or ()))


def tokenize_documents(
    prompter: Prompter, bodies: Sequence[str], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [Q,S] and lengths [Q] int32 of documents, each truncated to `max_tokens`.

    The shape depends on `max_tokens` only.
    """
    longest = max_tokens + len(prompter.direct.suffix) + len(prompter.direct.closing)
    return pad_rows(prompter.direct_rows(bodies, max_tokens), length=bucket_length(longest), pad_id=0)


def put_batch(batch: RlBatch, mesh: Mesh | None) -> RlBatch:
    """Place a batch on its mesh, each micro-batch's rows and queries across `BATCH_AXES`.

    Arrays that the axes do not divide, and all others, are replicated.
    """
    if mesh is None:
        return batch
    return jax.tree.map(
        lambda x, sharding_of: jax.make_array_from_callback(x.shape, sharding_of, x.__getitem__),
        batch,
        batch_shardings(batch, mesh),
    )


def batch_shardings(batch: RlBatch, mesh: Mesh) -> RlBatch:
    """Shardings of a batch, in the batch's structure."""
    devices = axis_size(mesh, BATCH_AXES)

    def of(x: Any) -> NamedSharding:
        return NamedSharding(
            mesh, PartitionSpec(None, BATCH_AXES) if x.shape[1] % devices == 0 else PartitionSpec()
        )

    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = RlBatch(replies=Replies(*map(of, batch.replies)), documents=everywhere)
    if batch.trained_ids is None:
        return placed
    rows = (
        NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        if len(batch.trained_ids) % devices == 0
        else everywhere
    )
    return placed._replace(trained_ids=rows, trained_lengths=rows)


def make_scorer(
    graph: nnx.GraphDef[Decoder], prompter: Prompter, config: RlConfig, shardings: TrainState | None = None
) -> Scorer:
    """Make `(params, frozen, replies, adapters) → log-probabilities [K,b,T]` of the sampled tokens.

    `adapters=False` scores with the frozen base.
    """
    mesh = _mesh_of(shardings)

    @partial(jax.jit, static_argnames="adapters", compiler_options=compiler_options(mesh))
    def score(params: nnx.State, frozen: nnx.State, replies: Replies, adapters: bool) -> jax.Array:
        def one(part: Replies) -> jax.Array:
            decoder = nnx.merge(graph, params, frozen)
            return _read(
                decoder, prompter, part, temperature=config.sampler.temperature, adapters=adapters, mesh=mesh
            )[0]

        with use_mesh(mesh):
            return jax.lax.map(one, jax.tree.map(jnp.asarray, replies))

    return score


def make_update(
    graph: nnx.GraphDef[Decoder],
    prompter: Prompter,
    optimizer: optax.GradientTransformation,
    config: RlConfig,
    shardings: TrainState | None = None,
    *,
    donate: bool = False,
) -> Update:
    """Make the jitted update of stage 2.

    Its signature: `(state, frozen, batch, old=None, reference=None) → (state, scalars, log_probs [K,b,T])`.
    `old` and `reference` [K,b,T] are log-probabilities before the first epoch, None with a single epoch, and
    of the reference, None where β is 0. The returned log-probabilities are those before the update. For a
    mesh see `sft_step.make_step`.
    """
    mesh = _mesh_of(shardings)

    def loss_and_gradient(
        params: nnx.State,
        frozen: nnx.State,
        batch: RlBatch,
        old: jax.Array | None,
        reference: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, nnx.State]:
        replies = batch.replies
        G = replies.ids.shape[1] // replies.prompt_ids.shape[1]
        # Counted over the whole batch: every micro-batch divides by the same totals.
        tokens_kbt = replies.sampled.reshape(-1, replies.sampled.shape[-1])
        policy_total = jnp.maximum(
            policy_count(tokens_kbt, config.variant, max_tokens=config.sampler.max_think_tokens), 1
        )
        infonce_total = jnp.maximum(
            G * jnp.sum(jnp.any(replies.relevance > 0, axis=-1), dtype=jnp.float32), 1
        )

        def part_loss(
            params: nnx.State, part: Replies, old_bt: jax.Array | None, reference_bt: jax.Array | None
        ) -> tuple[jax.Array, tuple[_Part, jax.Array]]:
            decoder = nnx.merge(graph, params, frozen)
            temperature = config.sampler.temperature
            log_probs_bt, entropies_bt, embeds_bd = _read(
                decoder, prompter, part, temperature=temperature, adapters=True, mesh=mesh
            )
            policy, statistics = _policy_loss(config, part, log_probs_bt, entropies_bt, old_bt, reference_bt)
            infonce = jnp.zeros(())
            if config.infonce.weight > 0:
                infonce = _infonce_loss(decoder, prompter, config, batch, part, embeds_bd)
            loss = policy / policy_total + config.infonce.weight * infonce / infonce_total
            return loss, (_Part(policy, infonce, statistics), log_probs_bt)

        def body(gradients: nnx.State, scanned: Any) -> tuple[nnx.State, tuple[jax.Array, _Part, jax.Array]]:
            (loss, (part, log_probs_bt)), more = jax.value_and_grad(part_loss, has_aux=True)(params, *scanned)
            return jax.tree.map(jnp.add, gradients, more), (loss, part, jax.lax.stop_gradient(log_probs_bt))

        start = jax.tree.map(jnp.zeros_like, params)
        gradients, (losses, parts, log_probs) = jax.lax.scan(body, start, (replies, old, reference))
        each = [jax.tree.map(lambda x, k=k: x[k], parts.statistics) for k in range(len(losses))]
        scalars = reduce(PolicyStatistics.merged, each).scalars()
        scalars |= {
            "policy": jnp.sum(parts.policy) / policy_total,
            "infonce": jnp.sum(parts.infonce) / infonce_total,
        }
        return jnp.sum(losses), scalars, log_probs, gradients

    replicated = None if shardings is None else shardings.skipped
    out_shardings = None if shardings is None else (shardings, replicated, replicated)

    @partial(
        jax.jit,
        donate_argnums=0 if donate else (),
        out_shardings=out_shardings,
        compiler_options=compiler_options(mesh),
    )
    def update(
        state: TrainState,
        frozen: nnx.State,
        batch: RlBatch,
        old: jax.Array | None = None,
        reference: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        batch = jax.tree.map(jnp.asarray, batch)
        with use_mesh(mesh):
            loss, scalars, log_probs, gradients = loss_and_gradient(
                state.params, frozen, batch, old, reference
            )
        state, about_update = updated(state, gradients, loss, optimizer)
        return state, {"loss": loss, **scalars, **about_update}, log_probs

    return update


def _policy_loss(
    config: RlConfig,
    part: Replies,
    log_probs_bt: jax.Array,
    entropies_bt: jax.Array,
    old_bt: jax.Array | None,
    reference_bt: jax.Array | None,
) -> tuple[jax.Array, PolicyStatistics]:
    """The policy gradient's sum over a micro-batch, and its statistics."""
    policy, _, statistics = policy_loss(
        log_probs_bt,
        part.advantages,
        part.sampled,
        variant=config.variant,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        max_tokens=config.sampler.max_think_tokens,
        old_log_probs_bt=old_bt,
        reference_log_probs_bt=reference_bt,
        beta=config.beta,
        kl_estimator=config.kl_estimator,
        sampler_log_probs_bt=part.sampler_log_probs if config.importance_cap > 0 else None,
        importance_cap=config.importance_cap,
        entropies_bt=entropies_bt,
    )
    return policy, statistics


def _infonce_loss(
    decoder: Decoder,
    prompter: Prompter,
    config: RlConfig,
    batch: RlBatch,
    part: Replies,
    embeds_bd: jax.Array,
) -> jax.Array:
    """The auxiliary InfoNCE's sum over a micro-batch's sampled queries."""
    G = part.ids.shape[0] // part.prompt_ids.shape[0]
    relevance_bp = jnp.repeat(part.relevance, G, axis=0)
    excluded_bp = jnp.zeros(relevance_bp.shape, bool)
    documents_pe = batch.documents
    if config.infonce.train_documents:
        trained_qe = _embedded(decoder, prompter, batch.trained_ids, batch.trained_lengths)
        documents_pe = jnp.concatenate([trained_qe, documents_pe[len(trained_qe) :]])
    infonce, _, _ = info_nce(
        l2_normalize(embeds_bd),
        documents_pe,
        relevance_bp,
        excluded_bp,
        temperature=config.infonce.temperature,
    )
    return infonce


def _read(
    decoder: Decoder,
    prompter: Prompter,
    part: Replies,
    *,
    temperature: float,
    adapters: bool,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [b,T] and entropies [b,T] of a micro-batch's tokens, and embed states [b,D].

    The first two are 0 where a token was not sampled; the states are those at the embed token. Prefix and
    prompt run once per query and are shared by the group, with gradients; the replies attend to them.
    """
    prompt, (B, T) = prompter.reason, part.ids.shape
    G = B // part.prompt_ids.shape[0]
    positions_qs = positions_from_lengths(part.prompt_lengths, part.prompt_ids.shape[1], len(prompt.prefix))
    positions_bt = positions_from_lengths(
        part.lengths, T, jnp.repeat(part.prompt_lengths + len(prompt.prefix), G)
    )
    texts = [
        prefix_text(prompt.prefix, adapters=adapters),
        Text(part.prompt_ids, positions_qs, behind=(0,), adapters=adapters),
        Text(part.ids, positions_bt, behind=(0, 1), adapters=adapters),
    ]
    _, (prompt_hidden, _), (hidden_btd, _) = decoder.read(texts)
    last_qd = jnp.take_along_axis(prompt_hidden, part.prompt_lengths[:, None, None] - 1, axis=1)[:, 0]
    hidden_btd = constrain(hidden_btd, BATCH_AXES)

    # The state that predicts token t is the one before it; the first is predicted by the prompt's last state.
    predicting = jnp.concatenate([jnp.repeat(last_qd, G, axis=0)[:, None], hidden_btd[:, :-1]], axis=1)
    hidden_md = states_for_head(predicting.reshape(B * T, -1))
    ids_m, mask_m = part.ids.reshape(-1), part.sampled.reshape(-1)
    states, _ = head_chunks(decoder.config.vocab_size, mesh)
    head = head_of(decoder, adapters=adapters)

    if mesh is None:
        scores_m = masked_token_log_probs(
            head.logits, hidden_md, ids_m, mask_m, temperature=temperature, chunk=states
        )
    else:
        scores_m = token_log_probs(head.logits, hidden_md, ids_m, temperature=temperature, chunk=states)
    log_probs, entropies = (jnp.where(mask_m, values_m, 0).reshape(B, T) for values_m in scores_m)
    embeds = jnp.take_along_axis(hidden_btd, (part.lengths - 1)[:, None, None], axis=1)[:, 0]
    return log_probs, entropies, embeds


def _embedded(decoder: Decoder, prompter: Prompter, ids_qs: jax.Array, lengths_q: jax.Array) -> jax.Array:
    """Unit vectors [Q,E] of directly embedded texts, with gradients, replicated."""
    prefix = prompter.direct.prefix
    positions_qs = positions_from_lengths(lengths_q, ids_qs.shape[1], len(prefix))
    _, (hidden_qsd, _) = decoder.read([prefix_text(prefix), Text(ids_qs, positions_qs, behind=(0,))])
    embeds = jnp.take_along_axis(constrain(hidden_qsd, BATCH_AXES), (lengths_q - 1)[:, None, None], axis=1)[
        :, 0
    ]
    return constrain(l2_normalize(embeds), None)


def _mesh_of(shardings: TrainState | None) -> Mesh | None:
    return None if shardings is None else jax.tree.leaves(shardings)[0].mesh
