"""Samples reasoning and its embedding in one pass; a group's samples share one prefilled prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.chips import chip_of
from search_r3_jax.compiler import compiler_options
from search_r3_jax.config import ModelConfig, SamplerConfig
from search_r3_jax.errors import UserError
from search_r3_jax.mesh import constrain, map_params, reshape_mesh, use_mesh
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.kv_block import KVBlock
from search_r3_jax.rollout.encoder import prefix_block, text_name
from search_r3_jax.rollout.sampling_program import Replies, make_program
from search_r3_jax.text.packing import bucket_length, pad_rows
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.vectors import require_finite

# The share of a chip's memory for the weights while replies are written; the rest is for the trainer's state
# and the caches.
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


@dataclass(frozen=True, kw_only=True)
class RunningRollout:
    """A rollout that the devices may still be busy with.

    Attributes:
        replies: arrays on the devices.
        name: how an error names a row of them.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    replies: Replies
    name: Callable[[int], str]

    def result(self) -> Rollout:
        """Wait for it; raises UserError naming the first text whose embedding is not finite."""
        arrays = {name: np.asarray(array) for name, array in self.replies._asdict().items()}
        require_finite(arrays["vectors"], self.name)
        return Rollout(prompt_ids=self.prompt_ids, prompt_lengths=self.prompt_lengths, **arrays)


def rollout_throughput(rollout: Rollout, seconds: float) -> dict[str, float]:
    """`rollout_tokens` of a rollout and `rollout_tokens_per_second`; prompts do not count."""
    return {"rollout_tokens": float(rollout.tokens), "rollout_tokens_per_second": rollout.tokens / seconds}


class Sampler:
    """Samples replies under given parameters; compiled once per (Q, G, prompt length) bucket."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        config: SamplerConfig,
        *,
        mesh: Mesh | None = None,
    ):
        """Make a sampler, which writes `config.slots` replies at a time.

        On a `mesh` the parameters keep the caller's sharding; each
        process passes the same texts and seeds, and gets all replies. Raises UserError for a setting out of
        range.
        """
        _check(config)
        self._prompter = prompter
        program = make_program(graph, prompter, config)

        def sample_on_mesh(state: nnx.State, *arguments: Any) -> Replies:
            decoder = nnx.merge(graph, state)
            # Every token reads all weights, so they are cast once and resharded once.
            state = jax.tree.map(lambda x: x.astype(decoder.compute_dtype), state)
            views = writing_meshes(mesh, decoder.config, _bytes(state))
            for view in views:
                with use_mesh(view):
                    state = map_params(lambda x, spec: constrain(x, *spec), state)
            with use_mesh(views[-1]):
                return program(state, *arguments)

        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._sample = jax.jit(
            sample_on_mesh,
            # None keeps the parameters' sharding. The rest is explicit, because JAX would take the
            # compiler's choice, a sharding of another view, for one of `mesh`.
            in_shardings=(None, replicated, replicated, replicated, None),
            out_shardings=replicated,
            compiler_options=compiler_options(mesh),
        )

        @jax.jit
        def prefix_of(state: nnx.State) -> KVBlock:
            with use_mesh(mesh):
                return prefix_block(nnx.merge(graph, state), prompter.reason.prefix)

        self._prefix_of = prefix_of

    def prefix(self, state: nnx.State) -> KVBlock:
        """Keys and values of the prompt prefix: for calls with the same parameters one after another."""
        return self._prefix_of(state)

    def compile(
        self,
        state: nnx.State,
        queries: int,
        group: int,
        *,
        max_tokens: int,
        prompt_tokens: int | None = None,
        shared: KVBlock | None = None,
    ) -> None:
        """Compile `sample` for these sizes without running it, so that a later call can be timed."""
        # Later calls with these shapes use the compiled program.
        length = prompt_tokens or self.prompt_tokens(max_tokens)
        self._lower(state, queries, group, length, shared).compile()

    def lower(self, state: nnx.State, queries: int, group: int, *, max_tokens: int) -> jax.stages.Lowered:
        """Lower `sample` for `queries` × `group` samples; the state may be one of shapes."""
        return self._lower(state, queries, group, self.prompt_tokens(max_tokens), None)

    def _lower(
        self, state: nnx.State, queries: int, group: int, prompt_tokens: int, shared: KVBlock | None
    ) -> jax.stages.Lowered:
        ids = jax.ShapeDtypeStruct((queries, prompt_tokens), np.int32)
        lengths, seeds = (
            jax.ShapeDtypeStruct((queries,), np.int32),
            jax.ShapeDtypeStruct((queries, group), np.uint32),
        )
        return self._sample.lower(state, ids, lengths, seeds, shared)

    def prompt_tokens(self, max_tokens: int) -> int:
        """Tokens that prompts are padded to, for texts of `max_tokens`."""
        return bucket_length(max_tokens + len(self._prompter.reason.suffix))

    def sample(
        self, state: nnx.State, texts: Sequence[str], seeds_qg: np.ndarray, *, max_tokens: int
    ) -> Rollout:
        """`start`, and wait for the result."""
        return self.start(state, texts, seeds_qg, max_tokens=max_tokens).result()

    def start(
        self,
        state: nnx.State,
        texts: Sequence[str],
        seeds_qg: np.ndarray,
        *,
        max_tokens: int,
        prompt_tokens: int | None = None,
        shared: KVBlock | None = None,
        name: Callable[[int], str] | None = None,
    ) -> RunningRollout:
        """Begin to sample replies to each text [Q] under the seeds [Q,G] (uint32).

        The same seed and text give the same reply, whatever else is sampled. The loop runs as long as the
        longest reply. Prompts are padded to `prompt_tokens`, by default what `max_tokens` allows, so one
        shape is compiled. `shared` is `prefix` of the same parameters. The result raises UserError naming the
        first text whose embedding is not finite, by its `name(number)`.
        """
        rows = self._prompter.reason_rows(texts, max_tokens)
        length = prompt_tokens or self.prompt_tokens(max_tokens)
        prompt_ids, prompt_lengths = pad_rows(rows, length=length, pad_id=0)
        replies = self._sample(state, prompt_ids, prompt_lengths, seeds_qg.astype(np.uint32), shared)
        group, named = seeds_qg.shape[1], name or (lambda number: text_name(number, texts))
        return RunningRollout(
            prompt_ids=prompt_ids,
            prompt_lengths=prompt_lengths,
            replies=replies,
            name=lambda row: named(row // group),
        )


def writing_meshes(mesh: Mesh | None, config: ModelConfig, size: float) -> list[Mesh | None]:
    """The meshes for sampling: the last one writes; weights are resharded through the others.

    `size` is that of the weights in bytes. Each device holds the whole weights; where they exceed its memory,
    it holds the heads of its part of the smallest group of devices that can hold them. Where no group can,
    the sharding stays, and the weights are gathered for every token, layer by layer.
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


def _check(config: SamplerConfig) -> None:
    if not (math.isfinite(config.temperature) and config.temperature >= 0):
        raise UserError(
            f"sampler.temperature: {config.temperature} is no finite number from 0 on; 0 is greedy, 1 the "
            "model's own distribution"
        )
    if config.max_think_tokens < 0:
        raise UserError(
            f"sampler.max_think_tokens: {config.max_think_tokens} is below 0; 0 forces the embed token"
        )
    if config.top_k < 0:
        raise UserError(f"sampler.top_k: {config.top_k} is below 0; 0 turns it off")
    if not 0 < config.top_p <= 1:
        raise UserError(f"sampler.top_p: {config.top_p} is not above 0 and at most 1; 1 turns it off")
    if config.slots < 0:
        raise UserError(f"sampler.slots: {config.slots} is below 0; 0 writes all rows at once")


def rollout_seeds(seed: int, step: int, queries: Sequence[int], group_size: int) -> np.ndarray:
    """Seeds [Q,G] uint32: a pure function of (run seed, step, query, sample).

    A resumed run samples the same. `queries` are permanent numbers of the queries, their rows in the
    collection; the seeds do not depend on the rest of the batch.
    """
    return np.stack(
        [np.random.SeedSequence([seed, step, int(query)]).generate_state(group_size) for query in queries]
    )
