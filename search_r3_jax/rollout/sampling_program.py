"""The compiled program that writes replies: one prefill a prompt, then a token a pass for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from search_r3_jax.config import SamplerConfig
from search_r3_jax.mesh import BATCH_AXES, constrain
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.kv_block import EMPTY_POSITION, KVBlock
from search_r3_jax.rollout.encoder import prefix_block
from search_r3_jax.rollout.prefill import prefill
from search_r3_jax.rollout.token_sampling import sample_token
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.vectors import l2_normalize


class Replies(NamedTuple):
    """B replies of at most T tokens, as `Rollout` describes them."""

    ids: jax.Array
    lengths: jax.Array
    sampled: jax.Array
    log_probs: jax.Array
    entropies: jax.Array
    vectors: jax.Array
    valid: jax.Array


class _Slots(NamedTuple):
    """S rows being written: which (`row` [S], B where idle), their tokens so far, the next token's logits."""

    row: jax.Array
    step: jax.Array
    closing_step: jax.Array
    logits: jax.Array
    cache: KVBlock


class _Loop(NamedTuple):
    """The state that a pass changes.

    `prompts` are those of each slot, where slots change their rows; None reads the batch's prompts, once for
    a whole group.
    """

    slots: _Slots
    prompts: KVBlock | None
    replies: Replies
    next_row: jax.Array


class _Batch(NamedTuple):
    """The arrays that all passes read: Q prompts, G samples each, B = Q·G rows."""

    prefix: KVBlock
    prompts: KVBlock
    first_logits_qv: jax.Array
    first_position_q: jax.Array
    keys_b: jax.Array
    group: int
    hidden_size: int


Program = Callable[[nnx.State, jax.Array, jax.Array, jax.Array, KVBlock | None], Replies]


def make_program(graph: nnx.GraphDef[Decoder], prompter: Prompter, config: SamplerConfig) -> Program:
    """Make `(state, prompt ids [Q,S], lengths [Q], seeds [Q,G], prefix) → Replies`.

    `config.slots` rows are written at a time; 0 writes all. Keys and values of the prefix are computed where
    None.
    """
    T = config.max_think_tokens + len(prompter.reason.closing)

    def program(
        state: nnx.State,
        ids_qs: jax.Array,
        lengths_q: jax.Array,
        seeds_qg: jax.Array,
        prefix: KVBlock | None,
    ) -> Replies:
        decoder = nnx.merge(graph, state)
        if prefix is None:
            prefix = prefix_block(decoder, prompter.reason.prefix)
        batch = _read_prompts(decoder, config, ids_qs, lengths_q, seeds_qg, prefix)
        B = seeds_qg.size
        S = min(config.slots, B) if config.slots else B

        def body(loop: _Loop) -> _Loop:
            loop = _write(decoder, prompter, config, batch, loop)
            if S == B:
                return loop
            some_idle = jnp.any(loop.slots.row == B) & (loop.next_row < B)
            return jax.lax.cond(some_idle, lambda loop: _refill(batch, loop), lambda loop: loop, loop)

        start = _start(batch, S, T)
        return jax.lax.while_loop(lambda loop: jnp.any(loop.slots.row < B), body, start).replies

    return program


def _read_prompts(
    decoder: Decoder,
    config: SamplerConfig,
    ids_qs: jax.Array,
    lengths_q: jax.Array,
    seeds_qg: jax.Array,
    prefix: KVBlock,
) -> _Batch:
    Q, G = seeds_qg.shape
    prefix_tokens = prefix.positions.shape[1]
    positions_qs = positions_from_lengths(lengths_q, ids_qs.shape[1], prefix_tokens)
    hidden_qsd, prompts = prefill(
        decoder, ids_qs, positions_qs, chunk=config.prefill_chunk, contexts=[prefix]
    )
    last_qd = jnp.take_along_axis(hidden_qsd, lengths_q[:, None, None] - 1, axis=1)[:, 0]
    return _Batch(
        prefix=prefix,
        prompts=prompts,
        first_logits_qv=decoder.logits(last_qd),
        first_position_q=lengths_q + prefix_tokens,
        keys_b=jax.vmap(jax.random.key)(seeds_qg.reshape(Q * G)),
        group=G,
        hidden_size=last_qd.shape[-1],
    )


def _start(batch: _Batch, S: int, T: int) -> _Loop:
    """The slots of the first S rows, before the first token."""
    B, G = len(batch.keys_b), batch.group
    L, _, _, K, H = batch.prompts.keys.shape
    empty = jnp.zeros((L, S, T, K, H), batch.prompts.keys.dtype)
    empty = constrain(empty, None, BATCH_AXES, None, "tensor")
    row_s = jnp.arange(S, dtype=jnp.int32)
    return _Loop(
        slots=_Slots(
            row=row_s,
            step=jnp.zeros((S,), jnp.int32),
            closing_step=jnp.full((S,), EMPTY_POSITION, jnp.int32),
            logits=batch.first_logits_qv[row_s // G],
            cache=KVBlock(empty, empty, jnp.full((S, T), EMPTY_POSITION, jnp.int32)),
        ),
        prompts=None if S == B else _prompts_of(batch, row_s),
        replies=Replies(
            ids=jnp.zeros((B, T), jnp.int32),
            lengths=jnp.zeros((B,), jnp.int32),
            sampled=jnp.zeros((B, T), bool),
            log_probs=jnp.zeros((B, T), jnp.float32),
            entropies=jnp.zeros((B, T), jnp.float32),
            vectors=jnp.zeros((B, batch.hidden_size), jnp.float32),
            valid=jnp.zeros((B,), bool),
        ),
        next_row=jnp.asarray(S, jnp.int32),
    )


def _write(decoder: Decoder, prompter: Prompter, config: SamplerConfig, batch: _Batch, loop: _Loop) -> _Loop:
    """Write one more token of each slot's row."""
    slots, replies = loop.slots, loop.replies
    B, S, row, t = len(batch.keys_b), len(slots.row), slots.row, slots.step
    closing = jnp.asarray(prompter.reason.closing, jnp.int32)
    active = row < B
    known = jnp.minimum(row, B - 1)
    # Out of budget: force the closing, token by token, so that every row ends with an embedding.
    out_of_budget = (slots.closing_step == EMPTY_POSITION) & (t >= config.max_think_tokens)
    closing_step = jnp.where(out_of_budget, 0, slots.closing_step)
    forced = closing_step != EMPTY_POSITION
    drawn = sample_token(
        slots.logits,
        batch.keys_b[known],
        t,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    token = jnp.where(forced, closing[jnp.clip(closing_step, 0, len(closing) - 1)], drawn.token)
    ends = token == prompter.embed_id
    # A reply that ends its turn without the embed token gets a forced closing, and is invalid.
    gave_up = ~forced & jnp.isin(token, jnp.asarray(prompter.end_ids, jnp.int32))
    position = jnp.where(active, batch.first_position_q[known // batch.group] + t, EMPTY_POSITION)
    prompts = batch.prompts if loop.prompts is None else loop.prompts
    hidden, new_block = decoder(
        token[:, None], position[:, None], contexts=[batch.prefix, prompts, slots.cache]
    )
    state = hidden[:, 0]
    # Idle rows are B, one past the end: writes there are dropped.
    chosen = jnp.where(forced, B, row)
    return loop._replace(
        slots=_Slots(
            row=jnp.where(ends, B, row),
            step=t + 1,
            closing_step=jnp.where(forced, closing_step + 1, jnp.where(gave_up, 0, closing_step)),
            logits=decoder.logits(state),
            cache=_append(slots.cache, new_block, t, same_step=S == B),
        ),
        replies=Replies(
            ids=replies.ids.at[row, t].set(token, mode="drop"),
            lengths=replies.lengths.at[row].set(t + 1, mode="drop"),
            sampled=replies.sampled.at[chosen, t].set(True, mode="drop"),
            log_probs=replies.log_probs.at[chosen, t].set(drawn.log_prob, mode="drop"),
            entropies=replies.entropies.at[chosen, t].set(drawn.entropy, mode="drop"),
            vectors=replies.vectors.at[jnp.where(ends, row, B)].set(l2_normalize(state), mode="drop"),
            valid=replies.valid.at[jnp.where(ends, chosen, B)].set(True, mode="drop"),
        ),
    )


def _refill(batch: _Batch, loop: _Loop) -> _Loop:
    """Replace the rows that have ended by the next ones."""
    slots, B = loop.slots, len(batch.keys_b)
    idle = slots.row == B
    following = jnp.minimum(loop.next_row + jnp.cumsum(idle) - 1, B)
    row = jnp.where(idle, following, slots.row).astype(jnp.int32)
    fresh = idle & (row < B)
    first_logits = batch.first_logits_qv[jnp.minimum(row, B - 1) // batch.group]
    keys, values, positions, _ = slots.cache
    return loop._replace(
        slots=_Slots(
            row=row,
            step=jnp.where(fresh, 0, slots.step),
            closing_step=jnp.where(fresh, EMPTY_POSITION, slots.closing_step),
            logits=jnp.where(fresh[:, None], first_logits, slots.logits),
            cache=KVBlock(keys, values, jnp.where(fresh[:, None], EMPTY_POSITION, positions)),
        ),
        prompts=_prompts_of(batch, row),
        next_row=loop.next_row + jnp.sum(fresh, dtype=jnp.int32),
    )


def _prompts_of(batch: _Batch, row_s: jax.Array) -> KVBlock:
    """Each slot's prompt; that of the last row for an idle slot."""
    q = jnp.minimum(row_s, len(batch.keys_b) - 1) // batch.group
    return KVBlock(batch.prompts.keys[:, q], batch.prompts.values[:, q], batch.prompts.positions[q])


def _append(cache: KVBlock, new: KVBlock, step_s: jax.Array, *, same_step: bool) -> KVBlock:
    """Append one token a row to the cache; with `same_step` all rows are at the same step."""
    if same_step:
        t = step_s[0]
        at_slot = (0, 0, t, 0, 0)
        return KVBlock(
            jax.lax.dynamic_update_slice(cache.keys, new.keys, at_slot),
            jax.lax.dynamic_update_slice(cache.values, new.values, at_slot),
            jax.lax.dynamic_update_slice(cache.positions, new.positions, (0, t)),
        )
    s = jnp.arange(step_s.shape[0])
    return KVBlock(
        cache.keys.at[:, s, step_s].set(new.keys[:, :, 0], mode="drop"),
        cache.values.at[:, s, step_s].set(new.values[:, :, 0], mode="drop"),
        cache.positions.at[s, step_s].set(new.positions[:, 0], mode="drop"),
    )
