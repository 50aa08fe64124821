"""Encodes texts whose replies are given: the shared prompt prefix once, then texts packed into rows."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.chips import peak_flops
from search_r3_jax.compiler import compiler_options
from search_r3_jax.mesh import BATCH_AXES, axis_size, use_mesh
from search_r3_jax.models.decoder import Decoder, Text
from search_r3_jax.models.kv_block import KVBlock
from search_r3_jax.profiling import ENCODE, step
from search_r3_jax.rollout.encoding_rate import EncodingRate
from search_r3_jax.text.packing import (
    EncodingPass,
    encoding_passes,
    row_length,
    rows_of_pass,
    texts_of_row,
)
from search_r3_jax.text.prompts import Mode, Prompter
from search_r3_jax.vectors import has_direction, l2_normalize, require_directions

# Padded tokens a pass and device. Small passes suit a CPU's caches: a decoder of 135M parameters ran 5 %
# faster at 1,024 than at 2,048.
CPU_PASS_TOKENS, PASS_TOKENS = 1024, 8192
# Texts a device that are held as tokens at once; the next ones are made meanwhile.
TEXTS_AT_ONCE = 2048
# Passes dispatched to the device before the first result is read, so that it never waits for the host to
# pack the next one.
PASSES_AHEAD = 2


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
    """Encodes token rows behind a mode's prefix, several to a row of a pass; compiled once for each shape.

    The parameters are an argument of each call. On a mesh, of this process's devices or of all processes',
    the rows of a pass are sharded across `BATCH_AXES`, and the parameters keep the caller's sharding; every
    process passes the same texts and gets all vectors.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        mode: Mode,
        *,
        pass_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        prefix = prompter.of(mode).prefix

        @functools.partial(jax.jit, compiler_options=compiler_options(mesh))
        def prefix_of(state: nnx.State) -> KVBlock:
            with use_mesh(mesh):
                return prefix_block(nnx.merge(graph, state), prefix)

        # Replicated, so that each process can read all vectors.
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        @functools.partial(jax.jit, out_shardings=everywhere, compiler_options=compiler_options(mesh))
        def encode(
            state: nnx.State,
            shared: KVBlock,
            ids_rt: jax.Array,
            positions_rt: jax.Array,
            segments_rt: jax.Array,
            columns_rm: jax.Array,
        ) -> jax.Array:
            decoder = nnx.merge(graph, state)
            with use_mesh(mesh):
                hidden, _ = decoder(ids_rt, positions_rt, segments_bt=segments_rt, contexts=[shared])
            read_rmd = jnp.take_along_axis(hidden, columns_rm[:, :, None], axis=1)
            return l2_normalize(read_rmd.astype(jnp.float32))

        self._prefix_of, self._encode = prefix_of, encode
        self._graph, self._mesh = graph, mesh
        self._embed_id, self._prefix_length = prompter.embed_id, len(prefix)
        self._shares = 1 if mesh is None else axis_size(mesh, BATCH_AXES)
        self._rate: EncodingRate | None = None
        self._pass_tokens = pass_tokens or (
            CPU_PASS_TOKENS if jax.default_backend() == "cpu" else PASS_TOKENS
        )

    def prefix(self, state: nnx.State) -> KVBlock:
        """Keys and values of the prompt prefix: for calls with the same parameters one after another."""
        return self._prefix_of(state)

    def compile_rows(self, state: nnx.State, rows: Sequence[Sequence[int]]) -> None:
        """Compile `encode_rows` for these rows without running it, so that a later call can be timed.

        Only the prefix is run.
        """
        if not rows:
            return
        shared = self._prefix_of(state)
        compiled: set[tuple[int, ...]] = set()
        for each in self._passes(rows):
            if each.ids.shape not in compiled:
                compiled.add(each.ids.shape)
                # Later calls with these shapes use the compiled program.
                self._encode.lower(state, shared, *self._put(each)).compile()

    def lower(self, state: nnx.State, *, text_tokens: int, pass_tokens: int) -> jax.stages.Lowered:
        """Lower a pass of `pass_tokens` padded tokens a device, of texts of `text_tokens`.

        The state may be one of shapes.
        """
        length = row_length(text_tokens)
        rows = rows_of_pass(length, pass_tokens) * self._shares
        placed = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        shared = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            jax.eval_shape(self._prefix_of, state),
        )
        shapes = [(rows, length)] * 3 + [(rows, texts_of_row(length))]
        return self._encode.lower(
            state, shared, *(jax.ShapeDtypeStruct(shape, np.int32, sharding=placed) for shape in shapes)
        )

    def encode_rows(
        self,
        state: nnx.State,
        rows: Sequence[Sequence[int]],
        on_progress: Callable[[int], object] | None = None,
        *,
        name: Callable[[int], str] = lambda row: f"text {row + 1}",
        shared: KVBlock | None = None,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 of token rows, each with one embed token.

        `on_progress` gets the number of finished rows; `shared` is `prefix` of the same parameters. Raises
        UserError, with the `name` of a row, as soon as its embedding is not finite or zero, and ValueError
        for a row without exactly one embed token.
        """
        config = nnx.merge(self._graph, state).config
        vectors = np.zeros((len(rows), config.hidden_size), np.float32)
        if not rows:
            return vectors
        if self._rate is None:
            devices = jax.devices()[:1] if self._mesh is None else list(self._mesh.devices.flat)
            self._rate = EncodingRate(config, chips=len(devices), peak=peak_flops(devices))
        with self._rate.counting(rows, self._prefix_length):
            self._encode_passes(state, rows, vectors, on_progress, name, shared)
        return vectors

    def rate(self) -> dict[str, float]:
        """`EncodingRate.scalars` of all that was encoded so far."""
        return {} if self._rate is None else self._rate.scalars()

    def _encode_passes(
        self,
        state: nnx.State,
        rows: Sequence[Sequence[int]],
        vectors: np.ndarray,
        on_progress: Callable[[int], object] | None,
        name: Callable[[int], str],
        shared: KVBlock | None,
    ) -> None:
        """Fill `vectors` [N,E], pass by pass; each is a step of a trace."""
        prefix = self._prefix_of(state) if shared is None else shared
        running: deque[tuple[EncodingPass, jax.Array]] = deque()

        def collect() -> None:
            each, encoded = running.popleft()
            there = each.texts >= 0
            at, found = each.texts[there], np.asarray(encoded)[there]
            if not has_direction(found).all():
                self._name_the_first(state, prefix, rows, at, name)
            vectors[at] = found
            if on_progress is not None:
                on_progress(len(at))

        for each in self._passes(rows):
            with step(ENCODE) as last:
                encoded = self._encode(state, prefix, *self._put(each))
                running.append((each, encoded))
                if last:
                    encoded.block_until_ready()
                if len(running) > PASSES_AHEAD:
                    collect()
        while running:
            collect()

    def _name_the_first(
        self,
        state: nnx.State,
        prefix: KVBlock,
        rows: Sequence[Sequence[int]],
        numbers: np.ndarray,
        name: Callable[[int], str],
    ) -> None:
        """Raise UserError for the first of some texts whose embedding, made alone, is not finite or zero.

        What is not finite spreads to the texts beside it in a row: 0 · NaN is NaN.
        """
        for number in sorted(numbers.tolist()):
            for alone in self._passes([rows[number]]):
                vector = np.asarray(self._encode(state, prefix, *self._put(alone)))[0, :1]
                require_directions(vector, lambda _, number=number: name(number))
        raise AssertionError("texts embed alone that did not together")

    def _passes(self, rows: Sequence[Sequence[int]]) -> Iterator[EncodingPass]:
        embed_id = self._embed_id
        for number, row in enumerate(rows):
            if list(row).count(embed_id) != 1:
                raise ValueError(f"row {number} has {list(row).count(embed_id)} embed tokens")
        return encoding_passes(
            rows,
            [list(row).index(embed_id) for row in rows],
            first_position=self._prefix_length,
            tokens=self._pass_tokens,
            # Not the embed token: 0 never is.
            pad_id=0,
            shares=self._shares,
        )

    def _put(self, each: EncodingPass) -> tuple[jax.typing.ArrayLike, ...]:
        """Ids, positions and segments [R,T] and columns [R,M] of a pass, on the mesh if there is one."""
        arrays = each.ids, each.positions, each.segments, each.columns
        if self._mesh is None:
            return arrays
        rows = NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        return tuple(jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in arrays)


class Encoder(RowEncoder):
    """Encodes texts directly."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        pass_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__(graph, prompter, "direct", pass_tokens=pass_tokens, mesh=mesh)
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
        """Unit vectors [N,E] float32 in the order of `texts`; `on_progress` gets the number finished.

        The tokens of `TEXTS_AT_ONCE` texts a device are held, and those of the next ones. Raises UserError as
        `encode_rows` does.
        """
        vectors: np.ndarray | None = None
        shared = self.prefix(state) if len(texts) else None
        for start, rows in self._pieces(texts, max_tokens):
            found = self.encode_rows(
                state,
                rows,
                on_progress,
                name=lambda row, start=start: text_name(start + row, texts),
                shared=shared,
            )
            if len(rows) == len(texts):
                return found
            if vectors is None:
                vectors = np.empty((len(texts), found.shape[1]), np.float32)
            vectors[start : start + len(rows)] = found
        assert vectors is not None
        return vectors

    def _pieces(self, texts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, list[list[int]]]]:
        """Where a piece of the texts begins, and its token rows; one piece of no texts."""
        size = TEXTS_AT_ONCE * self._shares
        starts = range(0, len(texts), size)

        def rows_from(start: int) -> list[list[int]]:
            return self._prompter.direct_rows(texts[start : start + size], max_tokens)

        if len(texts) <= size:
            yield 0, rows_from(0)
            return
        with ThreadPoolExecutor(1) as tokeniser:
            coming = tokeniser.submit(rows_from, 0)
            for start in starts:
                rows = coming.result()
                if start + size < len(texts):
                    coming = tokeniser.submit(rows_from, start + size)
                yield start, rows


class ReasonedEncoder(RowEncoder):
    """Encodes queries with given reasoning by teacher forcing.

    For replies of a sampler it gives the sampler's vectors.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        prompter: Prompter,
        *,
        pass_tokens: int | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__(graph, prompter, "reason", pass_tokens=pass_tokens, mesh=mesh)
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
        return self.encode_rows(state, rows, on_progress, name=lambda row: text_name(row, texts))
