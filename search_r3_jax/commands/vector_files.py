"""Texts with ids that `embed` reads, and vectors with ids that it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from search_r3_jax.console import TextConsole, progress_bar
from search_r3_jax.data.beir import read_documents, read_query_texts
from search_r3_jax.data.collection import Document
from search_r3_jax.data.dataset import MANIFEST, load_collection, load_collections
from search_r3_jax.errors import UserError
from search_r3_jax.files import save_array
from search_r3_jax.lines import (
    LineError,
    Problems,
    id_field,
    parse_object,
    read_lines,
    read_stream,
    string_field,
)

if TYPE_CHECKING:
    from search_r3_jax.embedder import Embedder

Kind = Literal["query", "document"]
STANDARD_INPUT = Path("-")
_ID_FIELDS = ("_id", "id", "doc_id", "query_id")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts and their ids; lines of a text file are numbered from 1 on."""

    ids: Sequence[str]
    texts: Sequence[str]


def read_texts(source: Path, kind: Kind, split: str | None = None) -> Texts:
    """The texts of a data set, of a .jsonl file, of a file with one a line, or of standard input (`-`).

    A data set is a BEIR folder or a built one; `split` chooses a split of it. Texts are joined with titles
    and instructions as in evaluation. Raises UserError naming file and line.
    """
    if source.is_dir():
        if split is None and not (source / MANIFEST).is_file():
            return _beir_texts(source, kind)
        return _texts_of_splits(source, kind, split)
    if split is not None:
        raise UserError(f"--split: {source} has no splits; leave it out, or give a data set")
    suffix = Path(source.name.lower().removesuffix(".gz")).suffix
    if suffix in (".csv", ".tsv", ".parquet"):
        raise UserError(
            f"--input: {source}: is a table; give a .jsonl, or a text a line (`data build` makes a data set "
            "of a table)"
        )
    if suffix in (".json", ".ndjson"):
        raise UserError(f"--input: {source}: is JSON; name it .jsonl, with an object a line")
    is_json = suffix == ".jsonl"
    problems = Problems()
    if source == STANDARD_INPUT and sys.stdin is None:
        raise UserError("--input: -: standard input is closed; give it something to read, or name a file")
    lines = (
        read_stream(sys.stdin.buffer, "standard input", problems, blank=True)
        if source == STANDARD_INPUT
        else read_lines(source, problems, blank=not is_json)
    )
    ids, texts, seen = list[str](), list[str](), set[str]()
    for number, (where, line) in enumerate(lines, 1):
        with problems.at(where):
            text_id, text = _fields(line, number) if is_json else (str(number), line)
            if text_id in seen:
                raise LineError("id twice", f"id {text_id!r} is there already; ids name one text each")
            seen.add(text_id)
            ids.append(text_id)
            texts.append(text)
    return Texts(ids=ids, texts=texts)


def _fields(line: str, number: int) -> tuple[str, str]:
    fields = parse_object(line)
    text_id = id_field(fields, _ID_FIELDS) or str(number)
    title = string_field(fields, "title", default="")
    return text_id, Document(doc_id=text_id, title=title, text=string_field(fields, "text")).body


def _beir_texts(folder: Path, kind: str) -> Texts:
    problems = Problems(as_published=True)
    if kind == "query":
        queries = read_query_texts(folder, problems)
        return Texts(ids=list(queries), texts=list(queries.values()))
    documents = read_documents(folder, problems)
    return Texts(ids=list(documents), texts=[document.body for document in documents.values()])


def _texts_of_splits(folder: Path, kind: str, split: str | None) -> Texts:
    """The texts of one split or of all; splits may share texts."""
    collections = load_collections(folder) if split is None else {split: load_collection(folder, split)}
    texts: dict[str, str] = {}
    for collection in collections.values():
        named = (
            ((query.query_id, query.body) for query in collection.queries)
            if kind == "query"
            else ((document.doc_id, document.body) for document in collection.documents)
        )
        for text_id, text in named:
            if texts.setdefault(text_id, text) != text:
                raise UserError(
                    f"--input: {folder}: id {text_id!r} names one text in a split and another in the next; "
                    f"choose one with --split ({', '.join(collections)})"
                )
    return Texts(ids=list(texts), texts=list(texts.values()))


def kept_vectors(
    embedder: Embedder, listed: Texts, kind: Kind, folder: Path, compute_dtype: str
) -> np.ndarray:
    """Direct vectors [N,E] float32 of texts, memory-mapped from `folder`; those that are there are reused.

    Raises UserError where the folder holds those of other texts or of another model.
    """
    # Imports jax, as reading texts need not.
    from search_r3_jax.retrieval.store.corpus_vectors import (
        SHARD_DOCUMENTS,
        EncodingSettings,
        encode_corpus,
    )

    documents = [
        Document(doc_id=text_id, title="", text=text)
        for text_id, text in zip(listed.ids, listed.texts, strict=True)
    ]
    settings = EncodingSettings(
        # Vectors that were computed in another precision are others.
        model_hash=f"{embedder.model_hash()}-{compute_dtype}",
        max_tokens=embedder.max_tokens,
        dimension=embedder.dimension,
        shard_documents=SHARD_DOCUMENTS,
    )
    with progress_bar(TextConsole(sys.stderr), "texts", len(documents)) as bar:

        def encode(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
            vectors = embedder.encode(list(texts), kind=kind, progress=False)
            if on_progress is not None:
                on_progress(len(texts))
            return vectors

        return encode_corpus(encode, documents, folder, settings, on_progress=bar.advance)


def writer_of(path: Path, ids: Sequence[str]) -> Callable[[Path, np.ndarray], None]:
    """What writes vectors [N,E] to a file of the kind that `path` ends in: .npy where it names none of these.

    `.npz` has `ids` and `vectors`; `.parquet` columns `id` and `vector`; `.jsonl` an object a line. Raises
    UserError for kinds that others would take for text.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt", ".json"):
        raise UserError(
            f"--out: {path}: no vectors are written as {suffix}; give .npy, .npz, .parquet or .jsonl"
        )
    if suffix == ".npz":
        return lambda file, vectors: _write_npz(file, ids, vectors)
    if suffix == ".jsonl":
        return lambda file, vectors: _write_jsonl(file, ids, vectors)
    if suffix == ".parquet":
        return lambda file, vectors: _write_parquet(file, ids, vectors)
    return save_array


def _write_npz(file: Path, ids: Sequence[str], vectors: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.savez(stream, ids=np.array(ids, dtype=np.str_), vectors=vectors)


def _write_jsonl(file: Path, ids: Sequence[str], vectors: np.ndarray) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for text_id, vector in zip(ids, vectors, strict=True):
            # The shortest digits that give the same float32 again.
            numbers = ",".join(str(number) for number in vector)
            stream.write(f'{{"id":{json.dumps(text_id)},"vector":[{numbers}]}}\n')


def _write_parquet(file: Path, ids: Sequence[str], vectors: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(vectors.reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    parquet.write_table(pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "vector": column}), file)
