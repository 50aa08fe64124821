"""What is known of a corpus without reading it again: ids, hash, digests of bodies; kept with a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from search_r3_jax.errors import UserError
from search_r3_jax.files import framed
from search_r3_jax.text.words import as_read

DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """Facts of N documents.

    Attributes:
        ids: document ids by row.
        corpus_hash: hexadecimal sha256 over ids and bodies in order; equal hashes mean equal index rows.
        digests: [N,16] uint8; equal where bodies are, as prompts hold them (`as_read`).
        blank: [N] bool, whether a body has nothing but white space.
    """

    ids: tuple[str, ...]
    corpus_hash: str
    digests: np.ndarray
    blank: np.ndarray


def gather_facts(bodies: Iterable[tuple[str, str]]) -> CorpusFacts:
    """The facts of documents, given as ids and bodies, in one pass."""
    corpus, ids, digests, blank = hashlib.sha256(), list[str](), bytearray(), list[bool]()
    for doc_id, body in bodies:
        corpus.update(framed(doc_id) + framed(body))
        ids.append(doc_id)
        digests += hashlib.sha256(as_read(body).encode()).digest()[:DIGEST_BYTES]
        blank.append(not body.strip())
    return CorpusFacts(
        ids=tuple(ids),
        corpus_hash=corpus.hexdigest(),
        digests=np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        blank=np.array(blank, bool),
    )


def write_facts(path: Path, facts: CorpusFacts) -> None:
    """Write facts as one file; raises OSError when the disk refuses."""
    encoded = [doc_id.encode() for doc_id in facts.ids]
    with path.open("wb") as file:
        np.savez(
            file,
            ids=np.frombuffer(b"".join(encoded), np.uint8),
            ends=np.cumsum([len(each) for each in encoded], dtype=np.int64),
            corpus_hash=np.frombuffer(facts.corpus_hash.encode(), np.uint8),
            digests=facts.digests,
            blank=facts.blank,
        )


def read_facts(path: Path) -> CorpusFacts:
    """Read the file of `write_facts`; raises UserError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            joined, ends = arrays["ids"].tobytes(), arrays["ends"].tolist()
            return CorpusFacts(
                ids=tuple(
                    joined[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)
                ),
                corpus_hash=arrays["corpus_hash"].tobytes().decode(),
                digests=arrays["digests"],
                blank=arrays["blank"],
            )
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: unreadable ({error}); build the data set again") from error
