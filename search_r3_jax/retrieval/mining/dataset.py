"""`data mine`: adds mined hard negatives to a data set, using a model's embeddings."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from search_r3_jax.config import InferenceConfig, Step
from search_r3_jax.console import TextConsole, progress_bar
from search_r3_jax.data.collection import Collection, Document
from search_r3_jax.data.dataset import build_dataset, load_collections, ordered_queries_hash
from search_r3_jax.errors import UserError
from search_r3_jax.files import target_of
from search_r3_jax.hub.export import max_text_tokens
from search_r3_jax.hub.load_model import load_for_inference, pinned_step
from search_r3_jax.hub.model_hash import model_hash
from search_r3_jax.hub.model_names import check_model_name, resolve
from search_r3_jax.outputs import check_output_folder
from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.protocol import IndexKind
from search_r3_jax.retrieval.mining.select import MiningOptions, Selection, distinct_texts, mine_negatives
from search_r3_jax.retrieval.store.corpus_vectors import (
    SHARD_DOCUMENTS,
    EncodingSettings,
    encode_corpus,
)
from search_r3_jax.rollout.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class MiningCounts:
    """Counts of the queries and the candidates of one split.

    Attributes:
        queries: of the split.
        documents: texts that were searched; copies count once.
        mined: negatives that were added.
        short: queries that got fewer than asked for.
        positives: candidates left out because they are known to be relevant.
        judged: candidates left out because they are negatives of the query already.
        too_close: candidates left out because they may be relevant.
    """

    queries: int
    documents: int
    mined: int
    short: int
    positives: int
    judged: int
    too_close: int


def mine_dataset(
    model: str,
    data: Path,
    out: Path,
    *,
    split: str,
    options: MiningOptions,
    index: IndexKind = "auto",
    max_query_tokens: int,
    max_document_tokens: int,
    step: Step = None,
    inference: InferenceConfig | None = None,
    shard_documents: int = SHARD_DOCUMENTS,
) -> MiningCounts:
    """Build `out` from the data set or BEIR folder `data`, with negatives mined by `model`.

    Only the queries of `split` get negatives; everything else is copied. The vectors are kept beside `out`
    until it is complete, so that the same command resumes after an interruption. Raises UserError for files
    that cannot be read or written.
    """
    _check_limits(("--max-query-tokens", max_query_tokens), ("--max-document-tokens", max_document_tokens))
    out, work, finished = _target(out)
    check_model_name(model)
    collections = load_collections(data)
    if split not in collections:
        raise UserError(
            f"--split: {data} has no split {split!r}; splits found: {', '.join(sorted(collections))}"
        )
    collection = collections[split]
    encoder = _Vectors(model, step, inference or InferenceConfig(), work, shard_documents)
    texts = distinct_texts(collection)
    if not work.is_dir():
        # Float32 vectors, in shards and joined.
        count = len(texts.documents) + len(collection.queries)
        check_output_folder("--out", out.parent, size=2 * 4 * count * encoder.dimension)
    documents_ue = encoder.encode("documents", texts.documents, max_document_tokens)
    # Queries are embedded as in training: directly, an instruction before the text.
    queries = [Document(doc_id=query.query_id, title="", text=query.body) for query in collection.queries]
    queries_qe = encoder.encode("queries", queries, max_query_tokens)
    searched = build_index(
        index, documents_ue, [document.doc_id for document in texts.documents], encoder.step or 0
    )
    selection = mine_negatives(
        searched, queries_qe, [query.query_id for query in collection.queries], texts, options
    )
    counts = _counts(selection, len(texts.documents), options)
    source = {
        "kind": "mined",
        "data": _identity(collections),
        "split": split,
        "model": {
            **{"name": encoder.name, "step": encoder.step, "hash": encoder.model_hash},
            **{"max_query_tokens": max_query_tokens, "max_document_tokens": max_document_tokens},
        },
        "index": searched.kind,
        "options": {**asdict(options), "last_rank": options.end_rank},
        "counts": asdict(counts),
    }
    mined = {**collections, split: _with_negatives(collection, selection, texts.documents)}
    _write(mined, out, work, finished=finished, name=collection.name, source=source)
    return counts


def _check_limits(*limits: tuple[str, int]) -> None:
    """Raise UserError for a limit of a text below 1."""
    for option, tokens in limits:
        if tokens < 1:
            raise UserError(f"{option}: {tokens}: give 1 or more")


def _target(out: Path) -> tuple[Path, Path, bool]:
    """The folder to write, that of the vectors, and whether the first is finished.

    Raises UserError where it cannot be written, or is not of an interrupted call.
    """
    out = target_of(out)
    check_output_folder("--out", out.parent)
    work = out.parent / f".{out.name}.mining"
    finished = out.is_file() or (out.is_dir() and any(out.iterdir()))
    # If the vectors are still there, the command was interrupted before it removed them: it may run again.
    if finished and not work.is_dir():
        raise UserError(f"--out: {out}: already exists; remove it or choose another")
    return out, work, finished


def _write(
    mined: Mapping[str, Collection],
    out: Path,
    work: Path,
    *,
    finished: bool,
    name: str,
    source: dict[str, Any],
) -> None:
    """Write the data set, where it is not `finished`, and remove the vectors in `work`."""
    try:
        if finished:
            build_dataset(mined, out, name=name, source=source)
        else:
            # Built in the work folder, so that leftovers of an interrupted build are removed with it.
            shutil.rmtree(work / "built", ignore_errors=True)
            build_dataset(mined, work / "built", name=name, source=source).rename(out)
    except OSError as error:
        raise UserError(
            f"--out: {out}: cannot be written ({error.strerror or error}); make room or choose another"
        ) from error
    shutil.rmtree(work, ignore_errors=True)


class _Vectors:
    """A model that embeds into a work folder, and its description for the data set.

    Attributes:
        name: of the model, without its folder.
        step: the checkpoint, where the model is a run.
        dimension: of a vector.
        model_hash: of everything that a vector depends on beside its text and the limit of tokens.
    """

    def __init__(self, model: str, step: Step, inference: InferenceConfig, work: Path, shard_documents: int):
        self.step = pinned_step(model, step)
        loaded = load_for_inference(model, inference, step=self.step)
        self.name = resolve(model).resolve().name if Path(model).exists() else model
        self._prompter = loaded.prompter()
        graph, self._state = nnx.split(loaded.decoder)
        self._encoder = Encoder(graph, self._prompter, mesh=loaded.mesh)
        self._config = loaded.decoder.config
        self.dimension = self._config.hidden_size
        self.model_hash = model_hash(self._state, self._config, self._prompter)
        if inference.compute_dtype != "float32":
            self.model_hash += f"-{inference.compute_dtype}"
        self._work, self._shard_documents = work, shard_documents

    def encode(self, what: str, documents: Sequence[Document], max_tokens: int) -> np.ndarray:
        """Vectors [N,E]; those that an interrupted command left in the work folder are reused."""
        room = min(max_tokens, max_text_tokens(self._prompter, self._config.max_positions))
        # On standard error, because standard output is for the result.
        with progress_bar(TextConsole(sys.stderr), what, len(documents)) as bar:
            return encode_corpus(
                partial(self._encoder.encode, self._state, max_tokens=room),
                documents,
                self._work / what,
                EncodingSettings(
                    model_hash=self.model_hash,
                    max_tokens=room,
                    dimension=self.dimension,
                    shard_documents=self._shard_documents,
                ),
                on_progress=bar.advance,
            )


def _identity(collections: Mapping[str, Collection]) -> dict[str, Any]:
    """Name and contents of a data set, wherever it is stored."""
    hashes = {
        split: {
            "corpus_hash": collection.corpus_hash(),
            "queries_hash": ordered_queries_hash(collection.queries),
        }
        for split, collection in collections.items()
    }
    return {"name": next(iter(collections.values())).name, "splits": hashes}


def _counts(selection: Selection, documents: int, options: MiningOptions) -> MiningCounts:
    mined_q = (selection.rows >= 0).sum(axis=1)
    return MiningCounts(
        queries=len(mined_q),
        documents=documents,
        mined=int(mined_q.sum()),
        short=int((mined_q < options.num_negatives).sum()),
        positives=int(selection.positives.sum()),
        judged=int(selection.judged.sum()),
        too_close=int(selection.too_close.sum()),
    )


def _with_negatives(
    collection: Collection, selection: Selection, documents: Sequence[Document]
) -> Collection:
    """The collection with each query's mined negatives behind the judged ones."""
    mined = [tuple(documents[row].doc_id for row in rows if row >= 0) for rows in selection.rows]
    queries = [
        replace(query, negatives=query.negatives + ids)
        for query, ids in zip(collection.queries, mined, strict=True)
    ]
    return replace(collection, queries=tuple(queries))
