"""Encodes a corpus shard by shard into a folder, and resumes where shards are already there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from search_r3_jax.data.collection import Document
from search_r3_jax.data.corpus_facts import gather_facts
from search_r3_jax.errors import TransientError, UserError, not_written
from search_r3_jax.files import replacing, write_array, write_json
from search_r3_jax.retrieval.store.vector_files import (
    VectorDtype,
    from_stored,
    open_vectors,
    stored_dtype,
    to_stored,
    write_vectors,
)
from search_r3_jax.vectors import has_direction, require_directions

RECORD, VECTORS = "corpus.json", "vectors.npy"
SHARD_DOCUMENTS = 2048
WAIT_SECONDS = 3600.0
POLL_SECONDS = 0.2
T = TypeVar("T")


class EncodeTexts(Protocol):
    """`Encoder.encode` with its parameters and its limit of tokens bound."""

    def __call__(
        self, texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Texts → vectors [N,E] float32 in their order."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What the vectors of a corpus depend on, beside its documents.

    Attributes:
        model_hash: stands for the weights, the tokenizer and the prompt.
        max_tokens: limit of a text, which the encoder has too.
        dimension: E of the vectors.
        dtype: of the stored vectors.
        shard_documents: documents of a shard; they are sliced a shard at a time.
        documents_hash: the documents' `corpus_hash`, where that is known.
    """

    model_hash: str
    max_tokens: int
    dimension: int
    dtype: VectorDtype = "float32"
    shard_documents: int = SHARD_DOCUMENTS
    documents_hash: str | None = None

    def description(self, documents: Sequence[Document]) -> dict[str, Any]:
        """The content of `corpus.json`."""
        known = self.documents_hash
        if known is None:
            known = gather_facts((each.doc_id, each.body) for each in documents).corpus_hash
        return {
            "format_version": 1,
            "corpus_hash": known,
            "documents": len(documents),
            "model_hash": self.model_hash,
            "max_tokens": self.max_tokens,
            "dimension": self.dimension,
            "dtype": self.dtype,
            "shard_documents": self.shard_documents,
        }


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the encoding that a process does: every `processes`-th shard, from `process` on.

    It waits `wait_seconds` for a file of another process. Raises ValueError for a process that is none.
    """

    process: int = 0
    processes: int = 1
    wait_seconds: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"process {self.process} of {self.processes}: want one of 0 to {self.processes - 1}"
            )


def encode_corpus(
    encode: EncodeTexts,
    documents: Sequence[Document],
    folder: Path,
    settings: EncodingSettings,
    *,
    share: Share = Share(),
    on_progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Encode the bodies of documents: vectors [N,E] of the settings' dtype, memory-mapped.

    `folder` keeps them as `shard-00000.npy` and so on, and joined as `vectors.npy`; `corpus.json` identifies
    them. `on_progress` gets the number of finished documents, existing shards included. After an
    interruption, the same call resumes.

    Several processes that share `folder` each encode their `share`; process 0 joins the shards, and all
    return when that is done. Raises UserError when the folder holds the vectors of another corpus or model,
    and when the disk refuses; TransientError when a file of another process does not come; EmbeddingError
    naming the first document whose vector is not finite or zero.
    """
    process, wait_seconds = share.process, share.wait_seconds
    dimension, dtype = settings.dimension, settings.dtype
    shards = _shards(folder, len(documents), dimension, settings.shard_documents, share.processes)
    if process > 0:
        _wait(partial(_present, folder / RECORD), folder / RECORD, 0, wait_seconds)
    _claim(folder, settings.description(documents), write=process == 0)
    for shard in shards[process :: share.processes]:
        if shard.read(dtype) is None:
            encoded = documents[shard.start : shard.stop]
            vectors = encode([document.body for document in encoded], on_progress=on_progress)
            shard.write(vectors, dtype, [document.doc_id for document in encoded])
        elif on_progress is not None:
            on_progress(shard.stop - shard.start)
    joined, shape = folder / VECTORS, (len(documents), dimension)
    if process > 0:
        # Wait for each shard first: the joined file comes long after the first ones.
        for shard in shards:
            _wait(partial(_present, shard.file), shard.file, shard.owner, wait_seconds)
        return _wait(partial(_joined, joined, shape, dtype), joined, 0, wait_seconds)
    _join(joined, shape, dtype, _in_order(shards, dtype, wait_seconds, on_progress))
    return open_vectors(joined, dtype)


def missing_shards(folder: Path, documents: Sequence[Document], settings: EncodingSettings) -> list[Shard]:
    """The shards that `folder` does not hold yet, in order; a new folder gets its `corpus.json`.

    Raises UserError as `encode_corpus`.
    """
    _claim(folder, settings.description(documents), write=True)
    shards = _shards(folder, len(documents), settings.dimension, settings.shard_documents, 1)
    return [shard for shard in shards if shard.read(settings.dtype) is None]


def join_shards(folder: Path) -> np.ndarray:
    """The vectors [N,E] of a folder whose shards are all there, memory-mapped, of its dtype.

    Raises OSError, ValueError or KeyError where its `corpus.json` cannot be read, ValueError where a shard is
    missing or damaged, and UserError when the disk refuses.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    dtype: VectorDtype = record["dtype"]
    shape = int(record["documents"]), int(record["dimension"])

    def each() -> Iterator[np.ndarray]:
        for shard in _shards(folder, *shape, int(record["shard_documents"]), 1):
            vectors = shard.read(dtype)
            if vectors is None:
                raise ValueError(f"{shard.file.name} is missing or damaged")
            yield vectors

    _join(folder / VECTORS, shape, dtype, each())
    return open_vectors(folder / VECTORS, dtype)


def is_encoded_with(folder: Path, model_hash: str) -> bool:
    """Whether a folder of `encode_corpus` is of this model, or of none yet; a damaged one is."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record["model_hash"] == model_hash
    except (OSError, ValueError, KeyError, TypeError):
        # `encode_corpus` says what is wrong with it.
        return True


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents `start` to `stop` and the file of their vectors, which process `owner` writes."""

    file: Path
    start: int
    stop: int
    dimension: int
    owner: int

    def read(self, dtype: VectorDtype) -> np.ndarray | None:
        """Its vectors [n,E]; None where the file is missing or damaged and has to be encoded again."""
        try:
            stored = np.load(self.file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        shape = (self.stop - self.start, self.dimension)
        if not isinstance(stored, np.ndarray) or stored.shape != shape or stored.dtype != stored_dtype(dtype):
            return None
        vectors = from_stored(stored, dtype)
        return vectors if has_direction(vectors).all() else None

    def write(self, vectors: np.ndarray, dtype: VectorDtype, ids: Sequence[str]) -> None:
        """Write its vectors [n,E]; raises EmbeddingError naming the first that is not finite or zero."""
        require_directions(vectors, lambda row: f"document {ids[row]}")
        write_array(self.file, to_stored(vectors, dtype))


def _shards(
    folder: Path, documents: int, dimension: int, shard_documents: int, processes: int
) -> list[Shard]:
    return [
        Shard(
            file=folder / f"shard-{number:05d}.npy",
            start=start,
            stop=min(start + shard_documents, documents),
            dimension=dimension,
            owner=number % processes,
        )
        for number, start in enumerate(range(0, documents, shard_documents))
    ]


def _in_order(
    shards: Sequence[Shard],
    dtype: VectorDtype,
    wait_seconds: float,
    on_progress: Callable[[int], object] | None,
) -> Iterator[np.ndarray]:
    """The vectors of each shard in order, waiting for those of other processes."""
    for shard in shards:
        yield _wait(partial(shard.read, dtype), shard.file, shard.owner, wait_seconds)
        if shard.owner != 0 and on_progress is not None:
            on_progress(shard.stop - shard.start)


def _wait(read: Callable[[], T | None], file: Path, owner: int, seconds: float) -> T:
    """Poll `read` until it returns a result; raises TransientError after `wait_seconds`."""
    deadline = time.monotonic() + seconds
    while (result := read()) is None:
        if time.monotonic() >= deadline:
            raise TransientError(
                f"{file}: has not come for {seconds:g} seconds; see that process {owner} runs, and repeat "
                "the command"
            )
        time.sleep(POLL_SECONDS)
    return result


def _present(file: Path) -> bool | None:
    return True if file.exists() else None


def _joined(file: Path, shape: tuple[int, int], dtype: VectorDtype) -> np.ndarray | None:
    try:
        vectors = open_vectors(file, dtype)
    except (OSError, ValueError):
        return None
    return vectors if vectors.shape == shape else None


def _join(file: Path, shape: tuple[int, int], dtype: VectorDtype, chunks: Iterator[np.ndarray]) -> None:
    """Write the vectors [N,E] of all shards as one file, atomically."""
    try:
        with replacing(file) as temporary:
            write_vectors(temporary, chunks, shape, dtype)
    except OSError as error:
        raise not_written(file, error, "make room or choose another --out") from error


def _claim(folder: Path, description: dict[str, Any], *, write: bool) -> None:
    """Write `corpus.json` of a new folder, or compare it with that of an existing one.

    Raises UserError when they differ, or when the folder has shards and no `corpus.json`.
    """
    remedy = f"remove {folder}, or repeat the command that made it"
    file = folder / RECORD
    try:
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(
                key
                for key in description
                if not isinstance(result, dict) or result.get(key) != description[key]
            )
            if differing:
                raise UserError(f"{file}: holds other vectors (differs in {', '.join(differing)}); {remedy}")
        elif any(folder.glob("shard-*.npy")):
            raise UserError(f"{file}: missing, so nothing says whose the shards beside it are; {remedy}")
        elif write:
            write_json(file, description)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise not_written(folder, error, "make room or choose another folder") from error
