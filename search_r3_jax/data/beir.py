"""Reader of folders in BEIR's layout, gzipped or not."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_r3_jax.data.collection import Collection, Document, Query, usable_split_name
from search_r3_jax.errors import UserError
from search_r3_jax.lines import (
    LineError,
    Problems,
    filled_field,
    parse_object,
    read_lines,
    shown,
    string_field,
)

# The last column name of a header row; some copies of the layout have no header.
SCORE_HEADERS = ("score", "relevance", "rel", "label")
MAX_SCORE = 2**31 - 1


def read_beir_splits(folder: Path, splits: Sequence[str], problems: Problems) -> dict[str, Collection]:
    """Split name → collection, all with the same documents.

    Lines that `problems` skips are left out. Raises UserError naming file and line.
    """
    corpus_file = _find(folder, "corpus.jsonl")
    queries_file = _find(folder, "queries.jsonl")
    qrels_files = {split: _find_split(folder, split) for split in splits}
    documents = _read_documents(corpus_file, problems)
    texts = _read_query_texts(queries_file, problems)
    known = _Known(texts=texts, doc_ids=documents, queries_file=queries_file, corpus_file=corpus_file)
    collections: dict[str, Collection] = {}
    for split, qrels_file in qrels_files.items():
        judged: dict[str, dict[str, int]] = {}
        _read_judgements(qrels_file, known, judged, problems)
        if not any(score > 0 for scores in judged.values() for score in scores.values()):
            raise UserError(f"{qrels_file}: no row with score > 0; a split needs at least one judged query")
        if (negatives_file := _existing(folder / "neg" / f"{split}.tsv")) is not None:
            _read_judgements(negatives_file, known, judged, problems, highest=0)
        collections[split] = Collection(
            name=folder.resolve().name,
            split=split,
            documents=tuple(documents.values()),
            queries=_queries(texts, judged),
        )
    return collections


def find_splits(folder: Path) -> list[str]:
    """The splits that a BEIR folder has judgements of.

    Raises UserError when there is none, or when a split has an unusable name.
    """
    splits = _judged_splits(folder)
    if not splits:
        raise UserError(
            f"{folder}: no qrels/<split>.tsv; without judgements there is nothing to learn or measure"
        )
    for split in splits:
        if not usable_split_name(split):
            remedy = (
                "rename it to letters, digits and '_', not 'all' or 'shared', or choose others with --split"
            )
            raise UserError(f"{folder / 'qrels'}: split name {shown(split)} is not usable; {remedy}")
    return splits


@dataclass(frozen=True, kw_only=True)
class _Known:
    """The ids that a judgement may name, and the files that define them."""

    texts: Container[str]
    doc_ids: Container[str]
    queries_file: Path
    corpus_file: Path


def _read_documents(path: Path, problems: Problems) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for where, line in read_lines(path, problems):
        with problems.at(where):
            fields = parse_object(line)
            doc_id = _identifier(fields, documents)
            document = Document(
                doc_id=doc_id,
                title=string_field(fields, "title", default=""),
                text=string_field(fields, "text"),
            )
            if not document.body.strip():
                raise LineError(
                    "empty text", "fields 'title' and 'text' are both empty; fill one or remove the line"
                )
            documents[doc_id] = document
    if not documents:
        raise UserError(f"{path}: no documents; expected one JSON object a line")
    return documents


def _read_query_texts(path: Path, problems: Problems) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, line in read_lines(path, problems):
        with problems.at(where):
            fields = parse_object(line)
            query_id = _identifier(fields, texts)
            texts[query_id] = filled_field(fields, "text")
    if not texts:
        raise UserError(f"{path}: no queries; expected one JSON object a line")
    return texts


def _read_judgements(
    path: Path,
    known: _Known,
    judged: dict[str, dict[str, int]],
    problems: Problems,
    *,
    highest: int = MAX_SCORE,
) -> None:
    for row, (where, line) in enumerate(read_lines(path, problems)):
        fields = line.split("\t")
        if row == 0 and fields[-1].strip().lower() in SCORE_HEADERS:
            continue
        with problems.at(where):
            query_id, doc_id, score = _judgement(fields, known, highest)
            earlier = judged.setdefault(query_id, {}).setdefault(doc_id, score)
            # An exact repetition is no contradiction; nor are two scores that both mean "irrelevant".
            if earlier != score and max(earlier, score) > 0:
                text = (
                    f"the pair {shown(query_id)}, {shown(doc_id)} is judged twice, {earlier} and {score}; "
                    "remove one row"
                )
                raise LineError("contradictory judgement", text)


def _judgement(fields: Sequence[str], known: _Known, highest: int) -> tuple[str, str, int]:
    if len(fields) != 3:
        text = f"expected 3 tab-separated fields (query-id, corpus-id, score), got {len(fields)}"
        raise LineError("wrong number of fields", text)
    query_id, doc_id, score = fields
    if query_id not in known.texts:
        text = (
            f"field 'query-id': {shown(query_id)} is not in {known.queries_file.name}; add it or remove "
            "the row"
        )
        raise LineError("unknown or skipped query", text)
    if doc_id not in known.doc_ids:
        text = (
            f"field 'corpus-id': {shown(doc_id)} is not in {known.corpus_file.name}; add it or remove the row"
        )
        raise LineError("unknown or skipped document", text)
    # int() alone also accepts "1_0" and digits of other scripts, and fails on thousands of digits.
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", score.strip()) or abs(int(score)) > MAX_SCORE:
        raise LineError("bad score", f"field 'score': expected an integer of 32 bits, got {shown(score)}")
    if int(score) > highest:
        raise LineError(
            "bad score", f"field 'score': {score} in a file of negatives; expected {highest} or less"
        )
    return query_id, doc_id, int(score)


def _queries(texts: dict[str, str], judged: dict[str, dict[str, int]]) -> tuple[Query, ...]:
    queries: list[Query] = []
    for query_id, text in texts.items():
        scores = judged.get(query_id, {})
        positives = {doc_id: score for doc_id, score in scores.items() if score > 0}
        negatives = tuple(doc_id for doc_id, score in scores.items() if score <= 0)
        if positives:
            queries.append(Query(query_id=query_id, text=text, positives=positives, negatives=negatives))
    return tuple(queries)


def _identifier(fields: dict[str, object], seen: Container[str]) -> str:
    identifier = string_field(fields, "_id")
    if not identifier:
        raise LineError("empty id", "field '_id' is empty; give every line an id")
    if identifier in seen:
        raise LineError("duplicate id", f"field '_id': {shown(identifier)} appears twice; ids must be unique")
    return identifier


def _find_split(folder: Path, split: str) -> Path:
    path = _existing(folder / "qrels" / f"{split}.tsv")
    if path is None:
        raise UserError(
            f"{folder}: no qrels/{split}.tsv; splits found: {', '.join(_judged_splits(folder)) or 'none'}"
        )
    return path


def _judged_splits(folder: Path) -> list[str]:
    names = {file.name.removesuffix(".gz") for file in (folder / "qrels").glob("*.tsv*")}
    return sorted(name.removesuffix(".tsv") for name in names if name.endswith(".tsv"))


def _find(folder: Path, name: str) -> Path:
    path = _existing(folder / name)
    if path is None:
        raise UserError(f"{folder}: neither {name} nor {name}.gz found; expected a folder in BEIR's layout")
    return path


def _existing(path: Path) -> Path | None:
    zipped = path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, zipped) if candidate.is_file()), None)
