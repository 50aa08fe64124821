"""Writes reasoning and embeds it in one pass: prompts are prefilled once and shared by the group's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.models.attention import NOTHING, KVBlock
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.embedding import unit
from search_r3_jax.rollout.encoder import prefix_block
from search_r3_jax.rollout.prefill import prefill
from search_r3_jax.text.packing import bucket_length, pad_rows
from search_r3_jax.text.prompts import Prompter


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """G samples for each of Q prompts, B = Q·G rows, T = `max_think_tokens` + closing.

    Attributes:
        prompt_ids: [Q,S] int32, right-padded; what follows the shared prefix.
        prompt_lengths: [Q] int32.
        ids: [B,T] int32, the reply up to and with the embed token.
        lengths: [B] int32.
        sampled: [B,T] bool, tokens that the policy chose; forced ones are not.
        log_probs: [B,T] float32 of the sampled tokens, under the sampling temperature.
        vectors: [B,E] float32 of unit norm.
        valid: [B] bool, the policy itself wrote the embed token within its budget.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    sampled: np.ndarray
    log_probs: np.ndarray
    vectors: np.ndarray
    valid: np.ndarray

    def replies(self) -> list[list[int]]:
        """Each row's reply, without padding."""
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]


class _Loop(NamedTuple):
    step: jax.Array
    cache: KVBlock
    logits: jax.Array
    ids: jax.Array
    sampled: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    done: jax.Array
    valid: jax.Array
    closing_step: jax.Array
    vectors: jax.Array


class Sampler:
    """Samples replies with whatever parameters it is handed; compiled once per (Q, G, prompt length) bucket."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        max_think_tokens: int,
        temperature: float,
        prefill_chunk: int = 0,
    ):
        self._prompter = prompter
        prompt, embed_id = prompter.reason, prompter.embed_id
        eos_id = prompter.eos_id
        closing = jnp.asarray(prompt.closing, jnp.int32)
        T = max_think_tokens + len(prompt.closing)

        def sample(state: nnx.State, ids_qs: jax.Array, lengths_q: jax.Array, seeds_qg: jax.Array) -> _Loop:
            decoder = nnx.merge(graph, state)
            Q, G = seeds_qg.shape
            B = Q * G
            shared = prefix_block(decoder, prompt.prefix)
            positions_qs = positions_from_lengths(lengths_q, ids_qs.shape[1], len(prompt.prefix))
            hidden_qsd, prompts = prefill(decoder, ids_qs, positions_qs, chunk=prefill_chunk, contexts=[shared])
            last_qd = jnp.take_along_axis(hidden_qsd, lengths_q[:, None, None] - 1, axis=1)[:, 0]
            first_position_b = jnp.repeat(lengths_q + len(prompt.prefix), G)
            keys_b = jax.vmap(jax.random.key)(seeds_qg.reshape(B))

            L, _, _, K, H = prompts.keys.shape
            empty = jnp.zeros((L, B, T, K, H), prompts.keys.dtype)
            start = _Loop(
                step=jnp.zeros((), jnp.int32),
                cache=KVBlock(empty, empty, jnp.full((B, T), NOTHING, jnp.int32)),
                logits=jnp.repeat(decoder.logits(last_qd), G, axis=0),
                ids=jnp.zeros((B, T), jnp.int32),
                sampled=jnp.zeros((B, T), bool),
                log_probs=jnp.zeros((B, T), jnp.float32),
                lengths=jnp.zeros((B,), jnp.int32),
                done=jnp.zeros((B,), bool),
                valid=jnp.zeros((B,), bool),
                closing_step=jnp.full((B,), NOTHING, jnp.int32),
                vectors=jnp.zeros((B, last_qd.shape[-1]), jnp.float32),
            )

            def body(loop: _Loop) -> _Loop:
                t = loop.step
                # Out of budget: the closing is forced, token by token, so that every row ends with an embedding.
                closing_step = jnp.where((loop.closing_step == NOTHING) & (t >= max_think_tokens), 0, loop.closing_step)
                forced = closing_step != NOTHING
                chosen, log_prob = _choose(loop.logits, keys_b, t, temperature)
                token = jnp.where(forced, closing[jnp.clip(closing_step, 0, len(prompt.closing) - 1)], chosen)
                ends = token == embed_id
                # A reply that ends its turn without an embedding is closed for it, and is not valid.
                gave_up = ~forced & (token == eos_id)
                position_b = jnp.where(loop.done, NOTHING, first_position_b + t)
                hidden, own = decoder(token[:, None], position_b[:, None], contexts=[shared, prompts, loop.cache])
                at_slot = (0, 0, t, 0, 0)
                cache = KVBlock(
                    jax.lax.dynamic_update_slice(loop.cache.keys, own.keys, at_slot),
                    jax.lax.dynamic_update_slice(loop.cache.values, own.values, at_slot),
                    jax.lax.dynamic_update_slice(loop.cache.positions, position_b[:, None], (0, t)),
                )
                active = ~loop.done
                by_policy = active & ~forced
                return _Loop(
                    step=t + 1,
                    cache=cache,
                    logits=decoder.logits(hidden[:, 0]),
                    ids=loop.ids.at[:, t].set(jnp.where(active, token, 0)),
                    sampled=loop.sampled.at[:, t].set(by_policy),
                    log_probs=loop.log_probs.at[:, t].set(jnp.where(by_policy, log_prob, 0.0)),
                    lengths=jnp.where(active, t + 1, loop.lengths),
                    done=loop.done | ends,
                    valid=loop.valid | (by_policy & ends),
                    closing_step=jnp.where(forced, closing_step + 1, jnp.where(gave_up, 0, closing_step)),
                    vectors=jnp.where((active & ends)[:, None], unit(hidden[:, 0]), loop.vectors),
                )

            return jax.lax.while_loop(lambda loop: ~jnp.all(loop.done), body, start)

        self._sample = jax.jit(sample)

    def sample(self, state: nnx.State, texts: Sequence[str], seeds_qg: np.ndarray, *, max_tokens: int) -> Rollout:
        """Samples for each text [Q] under the seeds [Q,G] (uint32): the same seed writes the same reply.

        The loop runs as long as the longest reply; prompts are padded to what `max_tokens` allows, so one shape is compiled.
        """
        rows = self._prompter.reason_rows(texts, max_tokens)
        length = bucket_length(max_tokens + len(self._prompter.reason.suffix))
        prompt_ids, prompt_lengths = pad_rows(rows, length=length, pad_id=0)
        loop = self._sample(state, prompt_ids, prompt_lengths, seeds_qg.astype(np.uint32))
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_lengths=prompt_lengths,
            ids=np.asarray(loop.ids),
            lengths=np.asarray(loop.lengths),
            sampled=np.asarray(loop.sampled),
            log_probs=np.asarray(loop.log_probs),
            vectors=np.asarray(loop.vectors),
            valid=np.asarray(loop.valid),
        )


def _choose(logits_bv: jax.Array, keys_b: jax.Array, t: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """A token per row and its log-probability under the sampling distribution; temperature 0 takes the best."""
    if temperature == 0.0:
        log_probs_bv = jax.nn.log_softmax(logits_bv, axis=-1)
        token = jnp.argmax(logits_bv, axis=-1)
    else:
        log_probs_bv = jax.nn.log_softmax(logits_bv / temperature, axis=-1)
        # Inverse transform: one random number a row, where the Gumbel trick would draw V.
        uniform_b = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys_b)
        cumulative_bv = jnp.cumsum(jnp.exp(log_probs_bv), axis=-1)
        token = jnp.sum(cumulative_bv <= uniform_b[:, None] * cumulative_bv[:, -1:], axis=-1)
        token = jnp.minimum(token, logits_bv.shape[-1] - 1)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs_bv, token[:, None], axis=-1)[:, 0]


def rollout_seeds(seed: int, step: int, queries: int, group_size: int) -> np.ndarray:
    """Seeds [Q,G] uint32, a pure function of (run seed, step, query, sample), so that a resumed run samples the same."""
    return np.random.SeedSequence([seed, step]).generate_state(queries * group_size).reshape(queries, group_size)
