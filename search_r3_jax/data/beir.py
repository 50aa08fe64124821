"""Reads a folder in BEIR's layout, gzipped or not."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.errors import UserError

QRELS_HEADER = ["query-id", "corpus-id", "score"]


def read_beir(folder: Path | str, split: str) -> Collection:
    """The collection in `folder` with the queries judged in `split`; raises UserError naming file and line."""
    folder = Path(folder)
    corpus_file = _find(folder, "corpus.jsonl")
    queries_file = _find(folder, "queries.jsonl")
    qrels_file = _find_split(folder, split)
    documents = _read_documents(corpus_file)
    texts = _read_query_texts(queries_file)
    doc_ids = {document.doc_id for document in documents}
    positives: dict[str, dict[str, int]] = {}
    for query_id, doc_id, score in _read_judgements(qrels_file, texts, queries_file, doc_ids, corpus_file):
        if score > 0:
            positives.setdefault(query_id, {})[doc_id] = score
    negatives: dict[str, list[str]] = {}
    if (negatives_file := _existing(folder / "neg" / f"{split}.tsv")) is not None:
        for query_id, doc_id, _ in _read_judgements(negatives_file, texts, queries_file, doc_ids, corpus_file):
            if doc_id in positives.get(query_id, ()):
                raise UserError(f"{negatives_file}: document {doc_id!r} is also a positive of query {query_id!r}; remove one")
            negatives.setdefault(query_id, []).append(doc_id)
    if not positives:
        raise UserError(f"{qrels_file}: no row with score > 0; a split needs at least one judged query")
    queries = tuple(
        Query(query_id=query_id, text=text, positives=positives[query_id], negatives=tuple(negatives.get(query_id, ())))
        for query_id, text in texts.items()
        if query_id in positives
    )
    return Collection(name=folder.resolve().name, split=split, documents=documents, queries=queries)


def _read_documents(path: Path) -> tuple[Document, ...]:
    documents: list[Document] = []
    seen: set[str] = set()
    for line_number, record in _json_lines(path):
        document = Document(
            doc_id=_identifier(record, path, line_number, seen),
            title=_string(record, "title", path, line_number) if "title" in record else "",
            text=_string(record, "text", path, line_number),
        )
        if not document.body.strip():
            raise UserError(f"{path}, line {line_number}: fields 'title' and 'text' are both empty; fill one or remove the line")
        documents.append(document)
    if not documents:
        raise UserError(f"{path}: no documents; expected one JSON object a line")
    return tuple(documents)


def _read_query_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for line_number, record in _json_lines(path):
        query_id = _identifier(record, path, line_number, seen)
        texts[query_id] = _string(record, "text", path, line_number)
        if not texts[query_id].strip():
            raise UserError(f"{path}, line {line_number}: field 'text' is empty; fill it or remove the line")
    return texts


def _read_judgements(
    path: Path, texts: dict[str, str], queries_file: Path, doc_ids: set[str], corpus_file: Path
) -> Iterator[tuple[str, str, int]]:
    seen: set[tuple[str, str]] = set()
    for line_number, line in _lines(path):
        where = f"{path}, line {line_number}"
        fields = line.split("\t")
        if line_number == 1:
            if fields != QRELS_HEADER:
                raise UserError(f"{where}: expected the header 'query-id<TAB>corpus-id<TAB>score'; add it")
            continue
        if len(fields) != 3:
            raise UserError(f"{where}: expected 3 tab-separated fields (query-id, corpus-id, score), got {len(fields)}")
        query_id, doc_id, score = fields
        if query_id not in texts:
            raise UserError(f"{where}: field 'query-id': {query_id!r} is not in {queries_file.name}; add it or remove the row")
        if doc_id not in doc_ids:
            raise UserError(f"{where}: field 'corpus-id': {doc_id!r} is not in {corpus_file.name}; add it or remove the row")
        if (query_id, doc_id) in seen:
            raise UserError(f"{where}: the pair {query_id!r}, {doc_id!r} is judged twice; remove one row")
        seen.add((query_id, doc_id))
        try:
            yield query_id, doc_id, int(score)
        except ValueError:
            raise UserError(f"{where}: field 'score': expected an integer, got {score!r}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line_number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {line_number}: not valid JSON ({error}); expected one object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {line_number}: expected a JSON object, got {type(record).__name__}")
        yield line_number, record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    line_number = 0
    try:
        with _open(path) as file:
            # Bytes are split at "\n" only: text may hold other separators such as U+2028.
            for line_number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if line_number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield line_number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line_number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}, after line {line_number}: damaged gzip file ({error}); fetch it again") from None


def _identifier(record: dict[str, Any], path: Path, line_number: int, seen: set[str]) -> str:
    identifier = _string(record, "_id", path, line_number)
    if not identifier:
        raise UserError(f"{path}, line {line_number}: field '_id' is empty; give every line an id")
    if identifier in seen:
        raise UserError(f"{path}, line {line_number}: field '_id': {identifier!r} appears twice; ids must be unique")
    seen.add(identifier)
    return identifier


def _string(record: dict[str, Any], field: str, path: Path, line_number: int) -> str:
    if field not in record:
        raise UserError(f"{path}, line {line_number}: field {field!r} is missing; add it")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{path}, line {line_number}: field {field!r} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON escapes can spell half a surrogate pair, which no UTF-8 file can store.
        raise UserError(f"{path}, line {line_number}: field {field!r} holds an unpaired surrogate escape; remove it") from None
    return value


def _find_split(folder: Path, split: str) -> Path:
    path = _existing(folder / "qrels" / f"{split}.tsv")
    if path is None:
        available = sorted(file.name.split(".tsv")[0] for file in (folder / "qrels").glob("*.tsv*"))
        raise UserError(f"{folder}: no qrels/{split}.tsv; splits found: {', '.join(available) or 'none'}")
    return path


def _find(folder: Path, name: str) -> Path:
    path = _existing(folder / name)
    if path is None:
        raise UserError(f"{folder}: neither {name} nor {name}.gz found; expected a folder in BEIR's layout")
    return path


def _existing(path: Path) -> Path | None:
    zipped = path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, zipped) if candidate.is_file()), None)


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
