"""Encodes texts whose replies are given: the shared prompt prefix once, then length buckets."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.compiler import compiler_options
from search_r3_jax.mesh import BATCH_AXES, axis_size, use_mesh
from search_r3_jax.models.decoder import Decoder, Text, positions_from_lengths
from search_r3_jax.models.embedding import pool_embedding
from search_r3_jax.models.kv_block import KVBlock
from search_r3_jax.text.packing import PaddedBatch, length_batches
from search_r3_jax.text.prompts import Mode, Prompter
from search_r3_jax.vectors import require_directions

# Padded tokens a batch and device. Small batches suit a CPU's caches: a decoder of 135M parameters ran 5 %
# faster at 1,024 than at 2,048.
CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 8192
# Batches dispatched to the device before the first result is read, so that it never waits for the host to
# pad the next one.
BATCHES_AHEAD = 2


def prefix_block(decoder: Decoder, prefix: Sequence[int], *, adapters: bool = True) -> KVBlock:
    """Keys and values [L,1,S,K,H] of a prompt prefix, shared by every row behind it."""
    return decoder.read([prefix_text(prefix, adapters=adapters)])[0][1]


def prefix_text(prefix: Sequence[int], *, adapters: bool = True) -> Text:
    """A prompt prefix [1,S] as a text that others may attend to."""
    return Text(
        jnp.asarray([prefix], jnp.int32), jnp.arange(len(prefix), dtype=jnp.int32)[None], adapters=adapters
    )


def both_prefixes(prompter: Prompter, *, adapters: bool = True) -> Text:
    """The direct and the reasoned prefix in one text [1,S]: segment 0 and segment 1."""
    prefixes = (prompter.direct.prefix, prompter.reason.prefix)
    ids = jnp.asarray([[token for prefix in prefixes for token in prefix]], jnp.int32)
    positions = jnp.concatenate([jnp.arange(len(prefix), dtype=jnp.int32) for prefix in prefixes])[None]
    segments = jnp.concatenate([jnp.full(len(prefix), i, jnp.int32) for i, prefix in enumerate(prefixes)])[
        None
    ]
    return Text(ids, positions, segments, adapters=adapters)


def text_name(row: int, texts: Sequence[str]) -> str:
    """How an error names a text: its number from 1 on, and its beginning."""
    return f"text {row + 1}" + (f" ({shortened(texts[row])!r})" if row < len(texts) else "")


def shortened(text: str) -> str:
    """The first line of a text, cut."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= 40 else line[:37] + "..."


class RowEncoder:
    """Encodes token rows behind a mode's prefix; compiled once per (rows, length) bucket.

    The parameters are an argument of each call. On a mesh, of this process's devices or of all processes',
    the rows of a batch are sharded across `BATCH_AXES`, and the parameters keep the caller's sharding; every
    process passes the same texts and gets all vectors.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        mode: Mode,
        *,
        batch_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        prefix, embed_id = prompter.of(mode).prefix, prompter.embed_id

        @functools.partial(jax.jit, compiler_options=compiler_options(mesh))
        def prefix_of(state: nnx.State) -> KVBlock:
            with use_mesh(mesh):
                return prefix_block(nnx.merge(graph, state), prefix)

        # Replicated, so that each process can read all vectors.
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        @functools.partial(jax.jit, out_shardings=everywhere, compiler_options=compiler_options(mesh))
        def encode(state: nnx.State, shared: KVBlock, ids: jax.Array, lengths: jax.Array) -> jax.Array:
            decoder = nnx.merge(graph, state)
            positions = positions_from_lengths(lengths, ids.shape[1], len(prefix))
            with use_mesh(mesh):
                hidden, _ = decoder(ids, positions, contexts=[shared])
            return pool_embedding(hidden, ids, embed_id).vectors

        self._prefix_of, self._encode = prefix_of, encode
        self._graph, self._mesh = graph, mesh
        self._batch_tokens = batch_tokens or (
            CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS
        )
        if mesh is not None:
            self._batch_tokens *= axis_size(mesh, BATCH_AXES)

    def compile_rows(self, state: nnx.State, rows: Sequence[Sequence[int]]) -> None:
        """Compile `encode_rows` for these rows without running it, so that a later call can be timed.

        Only the prefix is run.
        """
        if not rows:
            return
        shared = self._prefix_of(state)
        compiled: set[tuple[int, ...]] = set()
        for batch in self._batches(rows):
            if batch.ids.shape not in compiled:
                compiled.add(batch.ids.shape)
                # Later calls with these shapes use the compiled program.
                self._encode.lower(state, shared, *self._put(batch)).compile()

    def lower(self, state: nnx.State, *, length: int, batch_tokens: int) -> jax.stages.Lowered:
        """Lower the encoding of a batch: rows of `length`, `batch_tokens` padded tokens a device.

        The state may be one of shapes.
        """
        shares = 1 if self._mesh is None else axis_size(self._mesh, BATCH_AXES)
        rows = max(1, batch_tokens // length) * shares
        placed = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        ids = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=placed)
        shared = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            jax.eval_shape(self._prefix_of, state),
        )
        return self._encode.lower(
            state, shared, ids, jax.ShapeDtypeStruct((rows,), np.int32, sharding=placed)
        )

    def encode_rows(
        self,
        state: nnx.State,
        rows: Sequence[Sequence[int]],
        on_progress: Callable[[int], object] | None = None,
        *,
        texts: Sequence[str] = (),
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 of token rows, each with one embed token.

        `on_progress` gets the number of finished rows. Raises UserError, with the one of `texts` that a row
        is from, as soon as an embedding is not finite or zero.
        """
        vectors = np.zeros((len(rows), nnx.merge(self._graph, state).config.hidden_size), np.float32)
        if not rows:
            return vectors
        shared = self._prefix_of(state)
        running: deque[tuple[np.ndarray, jax.Array]] = deque()

        def collect() -> None:
            at, encoded = running.popleft()
            found = np.asarray(encoded)[: len(at)]
            # In the order of the texts, so that the first one is named.
            order = np.argsort(at)
            require_directions(found[order], lambda row: text_name(int(at[order[row]]), texts))
            vectors[at] = found
            if on_progress is not None:
                on_progress(len(at))

        for batch in self._batches(rows):
            running.append((batch.rows, self._encode(state, shared, *self._put(batch))))
            if len(running) > BATCHES_AHEAD:
                collect()
        while running:
            collect()
        return vectors

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[PaddedBatch]:
        # The pad id must not be the embed token, which has to occur once; 0 never is the embed token.
        return length_batches(rows, tokens=self._batch_tokens, pad_id=0)

    def _put(self, batch: PaddedBatch) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
        """Ids [B,T] and lengths [B] of a batch.

        On a mesh, rows of length 0 are added so that all devices have as many.
        """
        if self._mesh is None:
            return batch.ids, batch.lengths
        missing = -len(batch.ids) % axis_size(self._mesh, BATCH_AXES)
        filled = np.pad(batch.ids, ((0, missing), (0, 0))), np.pad(batch.lengths, (0, missing))
        rows = NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        ids, lengths = (jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in filled)
        return ids, lengths


class Encoder(RowEncoder):
    """Encodes texts directly."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        batch_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__(graph, prompter, "direct", batch_tokens=batch_tokens, mesh=mesh)
        self._prompter = prompter

    def compile(self, state: nnx.State, texts: Sequence[str], *, max_tokens: int) -> None:
        """Compile `encode` for these texts."""
        self.compile_rows(state, self._prompter.direct_rows(texts, max_tokens))

    def encode(
        self,
        state: nnx.State,
        texts: Sequence[str],
        *,
        max_tokens: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 in the order of `texts`; `on_progress` gets the number finished."""
        rows = self._prompter.direct_rows(texts, max_tokens)
        return self.encode_rows(state, rows, on_progress, texts=texts)


class ReasonedEncoder(RowEncoder):
    """Encodes queries with given reasoning by teacher forcing.

    For replies of a sampler it gives the sampler's vectors.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        batch_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__(graph, prompter, "reason", batch_tokens=batch_tokens, mesh=mesh)
        self._prompter = prompter

    def compile(
        self, state: nnx.State, texts: Sequence[str], replies: Sequence[Sequence[int]], *, max_tokens: int
    ) -> None:
        """Compile `encode` for these texts and replies."""
        self.compile_rows(state, self._prompter.replied_rows(texts, replies, max_tokens))

    def encode(
        self,
        state: nnx.State,
        texts: Sequence[str],
        replies: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 of texts [N] with complete replies [N].

        Each text is truncated to `max_tokens`; the replies are as from `Prompter.thought_ids`. Raises
        ValueError for a reply that does not end with its only embed token.
        """
        embed_id = self._prompter.embed_id
        for n, reply in enumerate(replies):
            if not reply or reply[-1] != embed_id or list(reply).count(embed_id) != 1:
                raise ValueError(f"reply {n} does not end with its only embed token")
        rows = self._prompter.replied_rows(texts, replies, max_tokens)
        return self.encode_rows(state, rows, on_progress, texts=texts)
