"""Search embeddings from Python: `Embedder` encodes texts, with or without reasoning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.config import SamplerConfig, Step
from search_r3_jax.console import Bar, TextConsole, progress_bar
from search_r3_jax.errors import UserError
from search_r3_jax.hub.export import MAX_TOKENS, max_text_tokens, read_export_manifest
from search_r3_jax.hub.load_model import LoadedModel, load_model, resolve
from search_r3_jax.hub.model_hash import model_hash
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.rollout.encoder import Encoder, text_name
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.prompts import Mode
from search_r3_jax.vectors import require_directions, unit_vectors

Kind = Literal["query", "document"]
MAX_THINK_TOKENS = SamplerConfig().max_think_tokens
THINK_BATCH = 32


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
    vector: np.ndarray
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
        if max_tokens < 1:
            raise UserError(f"max_tokens: {max_tokens}: give 1 or more")
        graph, self._state = nnx.split(model.decoder)
        self._encoder = Encoder(graph, prompter)
        sampling = SamplerConfig(max_think_tokens=max_think_tokens, temperature=temperature, prefill_chunk=0)
        self._sampler = Sampler(graph, prompter, sampling)
        self._prompter, self._config = prompter, model.decoder.config
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self.dimension = model.decoder.config.hidden_size
        self.parameters = sum(x.size for x in jax.tree.leaves(self._state))
        self.max_tokens = min(max_tokens, room)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        step: Step = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        max_tokens: int | None = None,
        max_think_tokens: int = MAX_THINK_TOKENS,
        temperature: float = 0.0,
    ) -> Embedder:
        """Load an exported folder, a run (at checkpoint `step`), any supported checkpoint, or `smollm2`.

        `max_tokens` None takes the value of an exported folder, else 512. Raises UserError when the model
        cannot be read or has other prompts.
        """
        manifest = read_export_manifest(resolve(name))
        if max_tokens is None:
            max_tokens = MAX_TOKENS if manifest is None else int(manifest["max_tokens"])
        model = load_model(name, step=step, compute_dtype=compute_dtype)
        return cls(model, max_tokens=max_tokens, max_think_tokens=max_think_tokens, temperature=temperature)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        kind: Kind = "query",
        mode: Mode = "direct",
        truncate_dim: int | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 in the order of `texts`, or [E] for a single text.

        `truncate_dim` keeps the first dimensions, normalised again. `progress` None shows a bar in a terminal
        only; True also prints plain lines elsewhere. Raises UserError for a document in mode "reason", for
        documents are embedded directly, and naming the first text whose embedding is not finite or zero.
        """
        if kind not in ("query", "document"):
            raise UserError(f"kind: {kind!r} is neither 'query' nor 'document'")
        if mode not in ("direct", "reason"):
            raise UserError(f"mode: {mode!r} is neither 'direct' nor 'reason'")
        if kind == "document" and mode == "reason":
            raise UserError("mode: documents are embedded directly; give mode 'direct', or kind 'query'")
        if truncate_dim is not None and not 0 < truncate_dim <= self.dimension:
            raise UserError(
                f"truncate_dim: {truncate_dim} is not within 1 and the model's {self.dimension} dimensions"
            )
        if isinstance(texts, str):
            return self.encode([texts], kind=kind, mode=mode, truncate_dim=truncate_dim, progress=progress)[0]
        if mode == "reason":
            thoughts = self.think(texts, progress=progress)
            vectors = (
                np.stack([thought.vector for thought in thoughts])
                if thoughts
                else np.zeros((0, self.dimension), np.float32)
            )
            # A thought may be read without a use for its vector; here the vector is asked for.
            require_directions(vectors, lambda row: text_name(row, texts))
        else:
            with _bar("texts", len(texts), progress) as bar:
                on_progress = bar.advance if bar is not None else None
                vectors = self._encoder.encode(
                    self._state, texts, max_tokens=self.max_tokens, on_progress=on_progress
                )
        if truncate_dim is None:
            return vectors
        return unit_vectors(vectors[:, :truncate_dim], lambda row: text_name(row, texts))

    @overload
    def think(self, texts: str, *, seed: int = 0, progress: bool | None = None) -> Thought: ...
    @overload
    def think(
        self, texts: Sequence[str], *, seed: int = 0, progress: bool | None = None
    ) -> list[Thought]: ...
    def think(
        self, texts: str | Sequence[str], *, seed: int = 0, progress: bool | None = None
    ) -> Thought | list[Thought]:
        """Reason about each query and embed it; `seed` matters only at a temperature above 0."""
        if isinstance(texts, str):
            return self.think([texts], seed=seed, progress=progress)[0]
        lengths = [len(ids) for ids in self._prompter.text_ids(texts, self.max_tokens)]
        # Sorted by length, so that batches need little padding.
        order = sorted(range(len(texts)), key=lambda i: -lengths[i])
        seeds = np.random.SeedSequence(seed).generate_state(len(texts))
        thoughts_by_row: dict[int, Thought] = {}
        with _bar("thoughts", len(texts), progress) as bar:
            for start in range(0, len(order), THINK_BATCH):
                rows = order[start : start + THINK_BATCH]
                # Padded to a power of two with the last text, so that few shapes are compiled.
                filled = rows + rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
                longest = max(1, lengths[rows[0]])
                rollout = self._sampler.sample(
                    self._state, [texts[i] for i in filled], seeds[filled][:, None], max_tokens=longest
                )
                for at, (i, reply) in enumerate(zip(rows, rollout.replies(), strict=False)):
                    thoughts_by_row[i] = Thought(
                        text=self._prompter.thought_text(reply),
                        vector=rollout.vectors[at],
                        valid=bool(rollout.valid[at]),
                        tokens=len(reply),
                    )
                if bar is not None:
                    bar.advance(len(rows))
        return [thoughts_by_row[i] for i in range(len(texts))]

    def similarity(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines [Q,N] float32 of unit vectors [Q,E] and [N,E]; a single vector [E] counts as one row."""
        return np.atleast_2d(queries) @ np.atleast_2d(documents).T

    def parameter_hash(self) -> str:
        """sha256 over all parameters: equal hashes, equal vectors."""
        return parameter_hash(self._state)

    def model_hash(self) -> str:
        """sha256 over parameters, config, tokenizer and prompts."""
        return model_hash(self._state, self._config, self._prompter)


def _bar(what: str, total: int, progress: bool | None) -> AbstractContextManager[Bar | None]:
    # On standard error, because standard output belongs to the caller.
    console = TextConsole(sys.stderr)
    shown = console.is_terminal if progress is None else progress
    if not shown or not total:
        return nullcontext()
    return progress_bar(console, what, total, aside=compile_seconds, note="compiling …")
