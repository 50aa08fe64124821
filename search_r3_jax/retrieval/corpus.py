"""The vectors of a corpus, encoded shard by shard into a folder: what is there already is not encoded again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3_jax.data.collection import Document, corpus_hash
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_array, write_json

RECORD = "corpus.json"
SHARD_DOCUMENTS = 2048


class EncodeTexts(Protocol):
    """`Encoder.encode` with its parameters and its limit of tokens bound."""

    def __call__(self, texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Texts → vectors [N,E] float32 in their order."""
        ...


def encode_corpus(
    encode: EncodeTexts,
    documents: Sequence[Document],
    folder: Path,
    *,
    model_hash: str,
    max_tokens: int,
    dimension: int,
    shard_documents: int = SHARD_DOCUMENTS,
    on_progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Vectors [N,E] float32 of the documents' bodies, E = `dimension`; `folder` keeps them as `shard-00000.npy` and so on.

    `corpus.json` says whose they are: `model_hash` stands for the weights, the tokenizer and the prompt, `max_tokens` for what `encode`
    reads of a text. `on_progress` hears how many documents are finished, at once of those that were there. Interrupted anywhere, the same
    call goes on. Raises UserError when the folder holds the vectors of another corpus or model, and when the disk refuses.
    """
    record = {
        "format_version": 1,
        "corpus_hash": corpus_hash(documents),
        "documents": len(documents),
        "model_hash": model_hash,
        "max_tokens": max_tokens,
        "dimension": dimension,
        "dtype": "float32",
        "shard_documents": shard_documents,
    }
    _claim(folder, record)
    # Filled in place: the vectors of a large corpus do not fit into memory twice.
    vectors = np.empty((len(documents), dimension), np.float32)
    for file, start, stop in _shards(folder, len(documents), shard_documents):
        shard = _stored(file, (stop - start, dimension))
        if shard is None:
            shard = encode([document.body for document in documents[start:stop]], on_progress=on_progress)
            write_array(file, shard)
        elif on_progress is not None:
            on_progress(stop - start)
        vectors[start:stop] = shard
    return vectors


def _shards(folder: Path, documents: int, shard_documents: int) -> Iterator[tuple[Path, int, int]]:
    """The file, the first document and the end of every shard."""
    for number, start in enumerate(range(0, documents, shard_documents)):
        yield folder / f"shard-{number:05d}.npy", start, min(start + shard_documents, documents)


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a new folder; raise UserError when the folder has another one, or shards and none."""
    remedy = f"remove {folder}, or repeat the command that made it"
    file = folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(key for key in record if not isinstance(found, dict) or found.get(key) != record[key])
            if differing:
                raise UserError(f"{file}: holds other vectors (differs in {', '.join(differing)}); {remedy}")
        elif any(folder.glob("shard-*.npy")):
            raise UserError(f"{file}: missing, so nothing says whose the shards beside it are; {remedy}")
        else:
            write_json(file, record)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); make room or choose another folder") from error


def _stored(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """A shard [n,E] that an earlier call finished; None where it is missing or damaged, and has to be encoded again."""
    try:
        shard = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(shard, np.ndarray) and shard.shape == shape and shard.dtype == np.float32
    return shard if fits and np.isfinite(shard).all() else None
