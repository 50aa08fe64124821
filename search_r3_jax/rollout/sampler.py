"""Writes reasoning and embeds it in one pass: prompts are prefilled once and shared by the group's
samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.chips import chip_of
from search_r3_jax.compiler import compiler_options
from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError
from search_r3_jax.mesh import BATCH_AXES, constrain, map_params, reshape_mesh, use_mesh
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.kv_block import EMPTY_POSITION, KVBlock
from search_r3_jax.rollout.encoder import prefix_block
from search_r3_jax.rollout.prefill import prefill
from search_r3_jax.rollout.token_sampling import sample_token
from search_r3_jax.text.packing import bucket_length, pad_rows
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.vectors import l2_normalize

# The share of a chip's memory that the weights may have while replies are written; a trainer's state and the
# caches have the rest.
MOST_OF_MEMORY = 0.5


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """G samples for each of Q prompts, B = Q·G rows, T = `max_think_tokens` + closing.

    Attributes:
        prompt_ids: [Q,S] int32, right-padded; what follows the shared prefix.
        prompt_lengths: [Q] int32.
        ids: [B,T] int32, the reply up to and with the embed token.
        lengths: [B] int32.
        sampled: [B,T] bool, tokens that the policy chose; forced ones are not.
        log_probs: [B,T] float32 of the sampled tokens in nats, under the temperature alone:
            softmax(logits/temperature) over the whole vocabulary, whatever top-k and top-p left out. A
            trainer's forward adds up in another order and differs in the last digits.
        entropies: [B,T] float32 in nats, of the distributions that `log_probs` are from; 0 where nothing was
            sampled.
        vectors: [B,E] float32 of unit norm.
        valid: [B] bool, the policy itself wrote the embed token within its budget.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    sampled: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    vectors: np.ndarray
    valid: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of all replies, forced ones included: each took a pass of the decoder."""
        return int(self.lengths.sum())

    def replies(self) -> list[list[int]]:
        """Each row's reply, without padding."""
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]


def rollout_throughput(rollout: Rollout, seconds: float) -> dict[str, float]:
    """`rollout_tokens` of a rollout and `rollout_tokens_per_second`; prompts are no tokens written."""
    return {"rollout_tokens": float(rollout.tokens), "rollout_tokens_per_second": rollout.tokens / seconds}


class _Slots(NamedTuple):
    """Rows being written, S of them: which (`row` [S], B where idle), how far each is, and what the next
    token is drawn from."""

    row: jax.Array
    step: jax.Array
    closing_step: jax.Array
    logits: jax.Array
    cache: KVBlock


class _Replies(NamedTuple):
    """What was written, all B rows."""

    ids: jax.Array
    lengths: jax.Array
    sampled: jax.Array
    log_probs: jax.Array
    entropies: jax.Array
    vectors: jax.Array
    valid: jax.Array


class _Loop(NamedTuple):
    slots: _Slots
    # Of each slot, where slots change their rows; else the prompts themselves are read, once for a whole
    # group.
    prompts: KVBlock | None
    replies: _Replies
    next_row: jax.Array


class Sampler:
    """Samples replies with whatever parameters it is handed; compiled once per (Q, G, prompt length)
    bucket."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        max_think_tokens: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        prefill_chunk: int = 0,
        slots: int = 0,
        mesh: Mesh | None = None,
    ):
        """`slots` rows are written at a time, and a finished one makes room for the next; 0 writes all at
        once.

        On a `mesh` the parameters lie as the caller laid them out, and each process, which gives the same
        texts and seeds, has all replies.

        Raises UserError for a temperature, `top_k`, `top_p` or `slots` out of range.
        """
        if temperature < 0:
            raise UserError(
                f"sampler.temperature: {temperature} is below 0; 0 is greedy, 1 the model's own distribution"
            )
        if top_k < 0:
            raise UserError(f"sampler.top_k: {top_k} is below 0; 0 turns it off")
        if not 0 < top_p <= 1:
            raise UserError(f"sampler.top_p: {top_p} is not above 0 and at most 1; 1 turns it off")
        if slots < 0:
            raise UserError(f"sampler.slots: {slots} is below 0; 0 writes all rows at once")
        self._prompter = prompter
        prompt, embed_id = prompter.reason, prompter.embed_id
        eos_id = prompter.eos_id
        closing = jnp.asarray(prompt.closing, jnp.int32)
        T = max_think_tokens + len(prompt.closing)

        def sample(
            state: nnx.State, ids_qs: jax.Array, lengths_q: jax.Array, seeds_qg: jax.Array
        ) -> _Replies:
            decoder = nnx.merge(graph, state)
            Q, G = seeds_qg.shape
            B = Q * G
            S = min(slots, B) if slots else B
            shared = prefix_block(decoder, prompt.prefix)
            positions_qs = positions_from_lengths(lengths_q, ids_qs.shape[1], len(prompt.prefix))
            hidden_qsd, prompts = prefill(
                decoder, ids_qs, positions_qs, chunk=prefill_chunk, contexts=[shared]
            )
            last_qd = jnp.take_along_axis(hidden_qsd, lengths_q[:, None, None] - 1, axis=1)[:, 0]
            first_logits_qv = decoder.logits(last_qd)
            first_position_q = lengths_q + len(prompt.prefix)
            keys_b = jax.vmap(jax.random.key)(seeds_qg.reshape(B))

            def prompts_of(row_s: jax.Array) -> KVBlock:
                q = jnp.minimum(row_s, B - 1) // G
                return KVBlock(prompts.keys[:, q], prompts.values[:, q], prompts.positions[q])

            L, _, _, K, H = prompts.keys.shape
            empty = constrain(
                jnp.zeros((L, S, T, K, H), prompts.keys.dtype), None, BATCH_AXES, None, "tensor"
            )
            row_s = jnp.arange(S, dtype=jnp.int32)
            start = _Loop(
                slots=_Slots(
                    row=row_s,
                    step=jnp.zeros((S,), jnp.int32),
                    closing_step=jnp.full((S,), EMPTY_POSITION, jnp.int32),
                    logits=first_logits_qv[row_s // G],
                    cache=KVBlock(empty, empty, jnp.full((S, T), EMPTY_POSITION, jnp.int32)),
                ),
                prompts=None if S == B else prompts_of(row_s),
                replies=_Replies(
                    ids=jnp.zeros((B, T), jnp.int32),
                    lengths=jnp.zeros((B,), jnp.int32),
                    sampled=jnp.zeros((B, T), bool),
                    log_probs=jnp.zeros((B, T), jnp.float32),
                    entropies=jnp.zeros((B, T), jnp.float32),
                    vectors=jnp.zeros((B, last_qd.shape[-1]), jnp.float32),
                    valid=jnp.zeros((B,), bool),
                ),
                next_row=jnp.asarray(S, jnp.int32),
            )

            def write(loop: _Loop) -> _Loop:
                slots, replies = loop.slots, loop.replies
                row, t = slots.row, slots.step
                active = row < B
                known = jnp.minimum(row, B - 1)
                # Out of budget: the closing is forced, token by token, so that every row ends with an
                # embedding.
                closing_step = jnp.where(
                    (slots.closing_step == EMPTY_POSITION) & (t >= max_think_tokens), 0, slots.closing_step
                )
                forced = closing_step != EMPTY_POSITION
                choice = sample_token(
                    slots.logits, keys_b[known], t, temperature=temperature, top_k=top_k, top_p=top_p
                )
                token = jnp.where(
                    forced, closing[jnp.clip(closing_step, 0, len(prompt.closing) - 1)], choice.token
                )
                ends = token == embed_id
                # A reply that ends its turn without an embedding is closed for it, and is not valid.
                gave_up = ~forced & (token == eos_id)
                position = jnp.where(active, first_position_q[known // G] + t, EMPTY_POSITION)
                context = prompts if loop.prompts is None else loop.prompts
                hidden, own = decoder(
                    token[:, None], position[:, None], contexts=[shared, context, slots.cache]
                )
                state = hidden[:, 0]
                # Idle rows are B, one past the end, where nothing is written.
                chosen = jnp.where(forced, B, row)
                return loop._replace(
                    slots=_Slots(
                        row=jnp.where(ends, B, row),
                        step=t + 1,
                        closing_step=jnp.where(forced, closing_step + 1, jnp.where(gave_up, 0, closing_step)),
                        logits=decoder.logits(state),
                        cache=_grown(slots.cache, own, t, together=S == B),
                    ),
                    replies=_Replies(
                        ids=replies.ids.at[row, t].set(token, mode="drop"),
                        lengths=replies.lengths.at[row].set(t + 1, mode="drop"),
                        sampled=replies.sampled.at[chosen, t].set(True, mode="drop"),
                        log_probs=replies.log_probs.at[chosen, t].set(choice.log_prob, mode="drop"),
                        entropies=replies.entropies.at[chosen, t].set(choice.entropy, mode="drop"),
                        vectors=replies.vectors.at[jnp.where(ends, row, B)].set(
                            l2_normalize(state), mode="drop"
                        ),
                        valid=replies.valid.at[jnp.where(ends, chosen, B)].set(True, mode="drop"),
                    ),
                )

            def refill(loop: _Loop) -> _Loop:
                slots = loop.slots
                idle = slots.row == B
                row = jnp.where(idle, jnp.minimum(loop.next_row + jnp.cumsum(idle) - 1, B), slots.row).astype(
                    jnp.int32
                )
                fresh = idle & (row < B)
                keys, values, positions, _ = slots.cache
                return loop._replace(
                    slots=_Slots(
                        row=row,
                        step=jnp.where(fresh, 0, slots.step),
                        closing_step=jnp.where(fresh, EMPTY_POSITION, slots.closing_step),
                        logits=jnp.where(
                            fresh[:, None], first_logits_qv[jnp.minimum(row, B - 1) // G], slots.logits
                        ),
                        cache=KVBlock(keys, values, jnp.where(fresh[:, None], EMPTY_POSITION, positions)),
                    ),
                    prompts=prompts_of(row),
                    next_row=loop.next_row + jnp.sum(fresh, dtype=jnp.int32),
                )

            def body(loop: _Loop) -> _Loop:
                loop = write(loop)
                if S == B:
                    return loop
                return jax.lax.cond(
                    jnp.any(loop.slots.row == B) & (loop.next_row < B), refill, lambda loop: loop, loop
                )

            return jax.lax.while_loop(lambda loop: jnp.any(loop.slots.row < B), body, start).replies

        def sample_on_mesh(state: nnx.State, *arguments: jax.Array) -> _Replies:
            decoder = nnx.merge(graph, state)
            # Every token reads all weights: they are cast once, and once brought to where they are read.
            state = jax.tree.map(lambda x: x.astype(decoder.compute_dtype), state)
            views = writing_meshes(mesh, decoder.config, _bytes(state))
            for view in views:
                with use_mesh(view):
                    state = map_params(lambda x, spec: constrain(x, *spec), state)
            with use_mesh(views[-1]):
                return sample(state, *arguments)

        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._sample = jax.jit(
            sample_on_mesh,
            # Parameters lie where they do. JAX asks the compiler of the rest, and would look for its answer,
            # of another view, in `mesh`.
            in_shardings=(None, everywhere, everywhere, everywhere),
            out_shardings=everywhere,
            compiler_options=compiler_options(mesh),
        )

    def compile(self, state: nnx.State, queries: int, group: int, *, max_tokens: int) -> None:
        """Compile what `sample` of so many queries and samples runs, and run none of it: what follows can be
        timed."""
        # A call with these shapes finds the program.
        self.lower(state, queries, group, max_tokens=max_tokens).compile()

    def lower(self, state: nnx.State, queries: int, group: int, *, max_tokens: int) -> jax.stages.Lowered:
        """What `sample` of so many queries and samples runs, to be compiled; the state may be one of
        shapes."""
        ids = jax.ShapeDtypeStruct((queries, self._prompt_tokens(max_tokens)), np.int32)
        lengths, seeds = (
            jax.ShapeDtypeStruct((queries,), np.int32),
            jax.ShapeDtypeStruct((queries, group), np.uint32),
        )
        return self._sample.lower(state, ids, lengths, seeds)

    def _prompt_tokens(self, max_tokens: int) -> int:
        return bucket_length(max_tokens + len(self._prompter.reason.suffix))

    def sample(
        self, state: nnx.State, texts: Sequence[str], seeds_qg: np.ndarray, *, max_tokens: int
    ) -> Rollout:
        """Samples for each text [Q] under the seeds [Q,G] (uint32): the same seed and text write the same
        reply, whatever else is sampled.

        The loop runs as long as the longest reply; prompts are padded to what `max_tokens` allows, so one
        shape is compiled.
        """
        rows = self._prompter.reason_rows(texts, max_tokens)
        prompt_ids, prompt_lengths = pad_rows(rows, length=self._prompt_tokens(max_tokens), pad_id=0)
        found = self._sample(state, prompt_ids, prompt_lengths, seeds_qg.astype(np.uint32))
        arrays = {name: np.asarray(array) for name, array in found._asdict().items()}
        return Rollout(prompt_ids=prompt_ids, prompt_lengths=prompt_lengths, **arrays)


def writing_meshes(mesh: Mesh | None, config: ModelConfig, size: float) -> list[Mesh | None]:
    """The mesh that replies are written on, as the last, and one that weights of so many bytes pass on their
    way there.

    Each device has the whole of the weights, or, where that is too much of its memory, the heads of its part
    of a group as small as can be. Where no such group can hold them they stay, and are gathered for every
    token, layer by layer.
    """
    if mesh is None:
        return [None]
    chip = chip_of(mesh.devices.flat[0].device_kind)
    memory = math.inf if chip is None else MOST_OF_MEMORY * chip.hbm
    shards, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    for group in (n for n in range(1, shards + 1) if shards % n == 0):
        heads = tensor * group
        if size / heads <= memory and not any(
            n % heads for n in (config.heads, config.kv_heads, config.feed_forward, config.vocab_size)
        ):
            return [
                reshape_mesh(mesh, fsdp=shards // group, tensor=heads),
                reshape_mesh(mesh, fsdp=1, tensor=heads),
            ]
    return [mesh]


def _bytes(tree: nnx.State) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _grown(cache: KVBlock, own: KVBlock, step_s: jax.Array, *, together: bool) -> KVBlock:
    """The cache with the keys and values of one more token a row; rows that go `together` are all at the same
    step."""
    if together:
        t = step_s[0]
        at_slot = (0, 0, t, 0, 0)
        return KVBlock(
            jax.lax.dynamic_update_slice(cache.keys, own.keys, at_slot),
            jax.lax.dynamic_update_slice(cache.values, own.values, at_slot),
            jax.lax.dynamic_update_slice(cache.positions, own.positions, (0, t)),
        )
    s = jnp.arange(step_s.shape[0])
    return KVBlock(
        cache.keys.at[:, s, step_s].set(own.keys[:, :, 0], mode="drop"),
        cache.values.at[:, s, step_s].set(own.values[:, :, 0], mode="drop"),
        cache.positions.at[s, step_s].set(own.positions[:, 0], mode="drop"),
    )


def rollout_seeds(seed: int, step: int, queries: Sequence[int], group_size: int) -> np.ndarray:
    """Seeds [Q,G] uint32, a pure function of (run seed, step, query, sample), so that a resumed run samples
    the same.

    `queries` are numbers that name the queries for good, their rows in the collection: what else is in the
    batch, and where, has no part.
    """
    return np.stack(
        [np.random.SeedSequence([seed, step, int(query)]).generate_state(group_size) for query in queries]
    )
