"""Search embeddings from Python: `Embedder` encodes texts, with or without reasoning."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.config import SamplerConfig, Step
from search_r3_jax.console import Bar, TextConsole, progress_bar
from search_r3_jax.errors import UserError
from search_r3_jax.hub.export import MAX_TOKENS, max_text_tokens, read_export_manifest
from search_r3_jax.hub.load_model import LoadedModel, load_model
from search_r3_jax.hub.model_hash import model_hash
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.models.kv_block import KVBlock
from search_r3_jax.precision import Precision, quantize
from search_r3_jax.profiling import ENCODE, step
from search_r3_jax.rollout.encoder import TEXTS_AT_ONCE, Encoder, text_name
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.arguments import Kind, check_arguments, check_whole_numbers
from search_r3_jax.text.inputs import text_list
from search_r3_jax.text.packing import PACKED_ROW, SHORTEST_ROW
from search_r3_jax.text.prompts import Mode
from search_r3_jax.vectors import require_directions, unit_vectors

Texts = Iterable[str]
"""Texts as callers have them: a list, a generator, a NumPy array, a column of pandas."""
MAX_THINK_TOKENS = SamplerConfig().max_think_tokens
# Queries that think together, and tokens of their prompts, are filled up to one of these: each pair is a
# program of its own, which takes seconds to compile.
THINK_ROWS, PROMPT_TOKENS = (1, 8, 32), (32, 128, 512)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Thought:
    """The model's reasoning about a query, and the resulting embedding.

    Attributes:
        text: the reasoning alone, without the closing of the reply and without control tokens.
        vector: [E] float32 of unit norm.
        valid: the model wrote the embed token itself; otherwise it was forced at the limit.
        tokens: length of the whole reply in tokens.
    """

    text: str
    vector: np.ndarray = field(repr=False)
    valid: bool
    tokens: int


class Embedder:
    """Turns texts into unit vectors; compiled programs are reused from call to call.

    Attributes:
        tokenizer: with `<|embed_token|>` in it.
        dimension: E, before any truncation.
        parameters: number of parameters.
        max_tokens: limit of a text in tokens; the prompt around it is never cut.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_tokens: int = MAX_TOKENS,
        max_think_tokens: int = MAX_THINK_TOKENS,
        temperature: float = 0.0,
    ):
        """Wrap a loaded model; temperature 0 is greedy.

        `max_tokens` is lowered to what the model's positions leave beside the prompt. Raises UserError for a
        limit out of range.
        """
        prompter = model.prompter()
        positions = model.decoder.config.max_positions
        room = max_text_tokens(prompter, positions)
        if room < 1:
            raise UserError(f"model: max_positions: {positions} leave no room for a text beside the prompt")
        check_whole_numbers(max_tokens=(max_tokens, 1))
        self._graph, self._state = nnx.split(model.decoder)
        self._encoder = Encoder(self._graph, prompter, mesh=model.mesh)
        self._prompter, self._config, self._mesh = prompter, model.decoder.config, model.mesh
        self._max_think_tokens, self._temperature = max_think_tokens, temperature
        self._samplers: dict[int, Sampler] = {}
        self._sampler(max_think_tokens)
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self.dimension = model.decoder.config.hidden_size
        self.parameters = sum(x.size for x in jax.tree.leaves(self._state))
        self.max_tokens = min(max_tokens, room)
        if not model.trained:
            logger.warning(
                "the model has never learnt its embed token: its vectors mean little before training"
            )

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        step: Step = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        param_dtype: Literal["float32", "bfloat16"] = "float32",
        max_tokens: int | None = None,
        max_think_tokens: int = MAX_THINK_TOKENS,
        temperature: float = 0.0,
        mesh: Mesh | None = None,
        warm_up: bool = False,
    ) -> Embedder:
        """Load an exported folder, a run (at checkpoint `step`), any supported checkpoint, or `smollm2`.

        `max_tokens` None takes the value of an exported folder, else 512. `param_dtype` bfloat16 halves the
        memory of the weights; with a `mesh` several devices share them and the texts. `warm_up` compiles now
        what small calls need. Raises UserError when the model cannot be read or has other prompts.
        """
        manifest = read_export_manifest(resolve(name))
        if max_tokens is None:
            max_tokens = MAX_TOKENS if manifest is None else int(manifest["max_tokens"])
        model = load_model(name, step=step, compute_dtype=compute_dtype, param_dtype=param_dtype, mesh=mesh)
        embedder = cls(
            model, max_tokens=max_tokens, max_think_tokens=max_think_tokens, temperature=temperature
        )
        if warm_up:
            embedder.warm_up()
        return embedder

    def warm_up(self) -> None:
        """Compile what single texts and small lists need, so that no later call of these waits for it."""
        started = time.perf_counter()
        embed_id, tail = self._prompter.embed_id, len(self._prompter.with_tail([[]])[0])
        length = SHORTEST_ROW
        while length < 2 * (self.max_tokens + tail):
            self._encoder.compile_rows(self._state, [[0] * (length - 1) + [embed_id]])
            length *= 2
        self._encoder.compile_rows(self._state, [[0] * (PACKED_ROW - 1) + [embed_id]] * 4)
        sampler = self._sampler(self._max_think_tokens)
        for rows in THINK_ROWS[:2]:
            sampler.compile(
                self._state,
                rows,
                1,
                max_tokens=self.max_tokens,
                prompt_tokens=PROMPT_TOKENS[0],
                shared=self._reason_prefix,
            )
        logger.info(f"compiled for small calls in {time.perf_counter() - started:.0f} s")

    def encode(
        self,
        texts: str | Texts,
        *,
        kind: Kind = "query",
        mode: Mode = "direct",
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        max_think_tokens: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 in the order of `texts`, or [E] for a single text.

        `truncate_dim` keeps the first dimensions, normalised again; `precision` is that of `quantize`.
        `max_think_tokens` is another budget for this call, in mode "reason". `batch_size` bounds the texts
        that are read together, by default as many as are fast. `progress` None shows a bar in a terminal
        only; True also prints plain lines elsewhere. Raises UserError for a document in mode "reason", for
        documents are embedded directly, for what is no text, and naming the first text whose embedding is
        not finite or zero.
        """
        check_arguments(
            kind, mode, self.dimension, truncate_dim, precision, max_think_tokens=max_think_tokens
        )
        check_whole_numbers(batch_size=(batch_size, 1))
        listed = text_list([texts] if isinstance(texts, str) else texts)
        if precision in ("int8", "uint8") and len(listed) == 1:
            raise UserError(f"precision: {precision}: one vector has no range; see `quantize`")
        if mode == "reason":
            thoughts = self.think(
                listed, max_think_tokens=max_think_tokens, batch_size=batch_size, progress=progress
            )
            vectors = self.vectors_of(thoughts, listed, truncate_dim=truncate_dim, precision=precision)
        else:
            encoded = self._encode_directly(listed, batch_size or max(1, len(listed)), progress)
            vectors = self.finished(encoded, listed, truncate_dim=truncate_dim, precision=precision)
        return vectors[0] if isinstance(texts, str) else vectors

    def vectors_of(
        self,
        thoughts: Sequence[Thought],
        texts: Sequence[str],
        *,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """The vectors of thoughts about `texts` as `encode` gives them, with its errors.

        A thought may be read without a use for its vector; here the vector is asked for.
        """
        check_arguments("query", "reason", self.dimension, truncate_dim, precision)
        vectors = np.array([thought.vector for thought in thoughts], np.float32).reshape(-1, self.dimension)
        require_directions(vectors, lambda row: text_name(row, texts))
        return self.finished(vectors, texts, truncate_dim=truncate_dim, precision=precision)

    def finished(
        self,
        vectors: np.ndarray,
        texts: Sequence[str],
        *,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Unit vectors [N,E] of `texts`, cut and in another precision, as `encode` gives them."""
        check_arguments("query", "direct", self.dimension, truncate_dim, precision)
        if truncate_dim is not None:
            vectors = unit_vectors(vectors[:, :truncate_dim], lambda row: text_name(row, texts))
        return quantize(vectors, precision)

    def encode_query(self, texts: str | Texts, *, mode: Mode = "direct", **options: Any) -> np.ndarray:
        """`encode` of queries."""
        return self.encode(texts, kind="query", mode=mode, **options)

    def encode_document(self, texts: str | Texts, **options: Any) -> np.ndarray:
        """`encode` of documents."""
        return self.encode(texts, kind="document", **options)

    @overload
    def think(
        self,
        texts: str,
        *,
        seed: int = 0,
        max_think_tokens: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Thought: ...
    @overload
    def think(
        self,
        texts: Texts,
        *,
        seed: int = 0,
        max_think_tokens: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[Thought]: ...
    def think(
        self,
        texts: str | Texts,
        *,
        seed: int = 0,
        max_think_tokens: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Thought | list[Thought]:
        """Reason about each query and embed it; `seed` matters only at a temperature above 0.

        `max_think_tokens` is another budget for this call; `batch_size` bounds those that think together.
        """
        check_whole_numbers(max_think_tokens=(max_think_tokens, 0), batch_size=(batch_size, 1))
        listed = text_list([texts] if isinstance(texts, str) else texts)
        budget = self._max_think_tokens if max_think_tokens is None else max_think_tokens
        most_tokens = self._thinking_room(budget)
        lengths, cut = list[int](), 0
        for start in range(0, len(listed), TEXTS_AT_ONCE):
            ids, longer = self._text_ids(listed[start : start + TEXTS_AT_ONCE], most_tokens)
            lengths += [len(row) for row in ids]
            cut += longer
        _warn_of_cut(cut, len(listed), most_tokens)
        # Sorted by length, so that batches need little padding.
        order = sorted(range(len(listed)), key=lambda i: -lengths[i])
        seeds = np.random.SeedSequence(seed).generate_state(len(listed))
        sampler = self._sampler(budget)
        suffix = len(self._prompter.reason.suffix)
        most = batch_size or THINK_ROWS[-1]
        thoughts_by_row: dict[int, Thought] = {}
        with _bar("thoughts", len(listed), progress) as bar:
            for start in range(0, len(order), most):
                rows = order[start : start + most]
                # Filled up with the last text.
                filled = rows + rows[-1:] * (_filled(len(rows), THINK_ROWS) - len(rows))
                with step(ENCODE):
                    rollout = sampler.start(
                        self._state,
                        [listed[i] for i in filled],
                        seeds[filled][:, None],
                        max_tokens=most_tokens,
                        prompt_tokens=_filled(lengths[rows[0]] + suffix, PROMPT_TOKENS),
                        shared=self._reason_prefix,
                        name=lambda row, filled=filled: text_name(filled[row], listed),
                    ).result()
                for at, (i, reply) in enumerate(zip(rows, rollout.replies(), strict=False)):
                    thoughts_by_row[i] = Thought(
                        text=self._prompter.thought_text(reply),
                        vector=rollout.vectors[at],
                        valid=bool(rollout.valid[at]),
                        tokens=len(reply),
                    )
                if bar is not None:
                    bar.advance(len(rows))
        thoughts = [thoughts_by_row[i] for i in range(len(listed))]
        return thoughts[0] if isinstance(texts, str) else thoughts

    def similarity(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines [Q,N] float32 of unit vectors [Q,E] and [N,E]; a single vector [E] counts as one row.

        Raises UserError for vectors of fewer bits, whose products are no cosines.
        """
        for name, vectors in (("queries", queries), ("documents", documents)):
            if not np.issubdtype(np.asarray(vectors).dtype, np.floating):
                raise UserError(f"{name}: {np.asarray(vectors).dtype}: give vectors of precision float32")
        return np.atleast_2d(queries) @ np.atleast_2d(documents).T

    def encoding_rate(self) -> dict[str, float]:
        """Tokens a second, in all and a chip, and `mfu` where known, of what was encoded directly so far."""
        return self._encoder.rate()

    def parameter_hash(self) -> str:
        """sha256 over all parameters: equal hashes, equal vectors."""
        return parameter_hash(self._state)

    def model_hash(self) -> str:
        """sha256 over parameters, config, tokenizer and prompts."""
        return model_hash(self._state, self._config, self._prompter)

    def _encode_directly(self, texts: Sequence[str], most: int, progress: bool | None) -> np.ndarray:
        vectors, cut = np.zeros((len(texts), self.dimension), np.float32), 0
        # Tokens take more memory than the texts: of so many at a time.
        most = min(most, TEXTS_AT_ONCE * jax.device_count())
        with _bar("texts", len(texts), progress) as bar:
            for start in range(0, len(texts), most):
                ids, longer = self._text_ids(texts[start : start + most], self.max_tokens)
                cut += longer
                vectors[start : start + len(ids)] = self._encoder.encode_rows(
                    self._state,
                    self._prompter.with_tail(ids),
                    bar.advance if bar is not None else None,
                    name=lambda row, start=start: text_name(start + row, texts),
                    shared=self._direct_prefix,
                )
        _warn_of_cut(cut, len(texts), self.max_tokens)
        return vectors

    def _text_ids(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], int]:
        """Token ids of each text, cut to `most`, and how many were longer."""
        ids = self._prompter.text_ids(texts, most + 1)
        return [row[:most] for row in ids], sum(len(row) > most for row in ids)

    def _thinking_room(self, budget: int) -> int:
        """Most tokens of a query that is thought about: the model's positions hold prompt and reply too."""
        reason, positions = self._prompter.reason, self._config.max_positions
        room = positions - len(reason.prefix) - len(reason.suffix) - budget - len(reason.closing)
        if room < 1:
            raise UserError(
                f"max_think_tokens: {budget}: with the prompt, no room for a query is left of the model's "
                f"{positions} positions; give less"
            )
        return min(self.max_tokens, room)

    @functools.cached_property
    def _direct_prefix(self) -> KVBlock:
        return self._encoder.prefix(self._state)

    @functools.cached_property
    def _reason_prefix(self) -> KVBlock:
        return self._sampler(self._max_think_tokens).prefix(self._state)

    def _sampler(self, max_think_tokens: int) -> Sampler:
        if max_think_tokens not in self._samplers:
            sampling = SamplerConfig(
                max_think_tokens=max_think_tokens, temperature=self._temperature, prefill_chunk=0
            )
            self._samplers[max_think_tokens] = Sampler(self._graph, self._prompter, sampling, mesh=self._mesh)
        return self._samplers[max_think_tokens]


def _warn_of_cut(cut: int, texts: int, most: int) -> None:
    if cut:
        logger.warning(f"{cut} of {texts} texts cut to {most} tokens (max_tokens)")


def _filled(count: int, sizes: Sequence[int]) -> int:
    """The least of the sizes that holds so many; beyond them the least power of two."""
    return next((size for size in sizes if count <= size), 1 << (count - 1).bit_length())


def _bar(what: str, total: int, progress: bool | None) -> AbstractContextManager[Bar | None]:
    # On standard error, because standard output belongs to the caller.
    console = TextConsole(sys.stderr)
    shown = console.is_terminal if progress is None else progress
    if not shown or not total:
        return nullcontext()
    return progress_bar(console, what, total, aside=compile_seconds, note="compiling …")
