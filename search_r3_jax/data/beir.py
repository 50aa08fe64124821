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
    parse_object,
    read_lines,
    shown,
    string_field,
)

# The last column name of a header row; some copies of the layout have no header.
SCORE_HEADERS = ("score", "relevance", "rel", "label")
MAX_SCORE = 2**31 - 1
_OR_SKIP = " or pass --skip-bad to data build"
EMPTY, NO_QUERY, NO_DOCUMENT = "empty text", "unknown or skipped query", "unknown or skipped document"


def read_beir_splits(folder: Path, splits: Sequence[str], problems: Problems) -> dict[str, Collection]:
    """Split name → collection, all with the same documents.

    Lines that `problems` skips are left out. A judgement of a document that is not there
    stays, as in BEIR: it counts in the ideal ranking. Raises UserError naming file and line.
    """
    corpus_file = _find(folder, "corpus.jsonl")
    queries_file = _find(folder, "queries.jsonl")
    qrels_files = {split: _find_split(folder, split) for split in splits}
    documents = read_documents(folder, problems)
    texts = read_query_texts(folder, problems)
    known = _Known(texts=texts, documents=documents, queries_file=queries_file, corpus_file=corpus_file)
    collections: dict[str, Collection] = {}
    for split, qrels_file in qrels_files.items():
        judged: dict[str, dict[str, int]] = {}
        _read_judgements(qrels_file, known, judged, problems)
        relevant = {doc_id for scores in judged.values() for doc_id, score in scores.items() if score > 0}
        if documents.keys().isdisjoint(relevant):
            raise UserError(
                f"{qrels_file}: no row with score > 0{' and a known document' if relevant else ''}; a split "
                "needs at least one judged query"
            )
        queries = tuple(judged)
        if (negatives_file := _existing(folder / "neg" / f"{split}.tsv")) is not None:
            _read_judgements(negatives_file, known, judged, problems, highest=0)
        collections[split] = Collection(
            name=folder.resolve().name,
            split=split,
            documents=tuple(documents.values()),
            queries=_queries(texts, {query_id: judged[query_id] for query_id in queries}),
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
    documents: Container[str]
    queries_file: Path
    corpus_file: Path

    def missing(self, query_id: str, doc_id: str) -> LineError | None:
        """What a judgement names without it being there."""
        for reason, field, value, there, file in (
            (NO_QUERY, "query-id", query_id, self.texts, self.queries_file),
            (NO_DOCUMENT, "corpus-id", doc_id, self.documents, self.corpus_file),
        ):
            if value not in there:
                text = (
                    f"field '{field}': {shown(value)} is not in {file.name}; add it, remove the row{_OR_SKIP}"
                )
                return LineError(reason, text)
        return None


def read_documents(folder: Path, problems: Problems) -> dict[str, Document]:
    """Id → document of a folder's corpus; raises UserError naming file and line."""
    path = _find(folder, "corpus.jsonl")
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
                empty = LineError(
                    EMPTY, f"fields 'title' and 'text' are both empty; fill one, remove the line{_OR_SKIP}"
                )
                if not problems.as_published:
                    raise empty
                problems.count(where, empty)
            documents[doc_id] = document
    if not documents:
        raise UserError(f"{path}: no documents; expected one JSON object a line")
    return documents


def read_query_texts(folder: Path, problems: Problems) -> dict[str, str]:
    """Id → text of all of a folder's queries, judged or not; raises UserError naming file and line."""
    path = _find(folder, "queries.jsonl")
    texts: dict[str, str] = {}
    for where, line in read_lines(path, problems):
        with problems.at(where):
            fields = parse_object(line)
            query_id = _identifier(fields, texts)
            text = string_field(fields, "text")
            if not text.strip():
                empty = LineError(EMPTY, f"field 'text' is empty; fill it, remove the line{_OR_SKIP}")
                if not problems.as_published:
                    raise empty
                problems.count(where, empty)
            texts[query_id] = text
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
            query_id, doc_id, score = _judgement(fields, highest)
            if (unknown := known.missing(query_id, doc_id)) is not None:
                if problems.strict:
                    raise unknown
                problems.count(where, unknown)
                if unknown.reason == NO_QUERY:
                    continue
            earlier = judged.setdefault(query_id, {}).setdefault(doc_id, score)
            # An exact repetition is no contradiction; nor are two scores that both mean "irrelevant".
            if earlier != score and max(earlier, score) > 0:
                text = (
                    f"the pair {shown(query_id)}, {shown(doc_id)} is judged twice, {earlier} and {score}; "
                    "remove one row"
                )
                raise LineError("contradictory judgement", text)


def _judgement(fields: Sequence[str], highest: int) -> tuple[str, str, int]:
    if len(fields) != 3:
        text = f"expected 3 tab-separated fields (query-id, corpus-id, score), got {len(fields)}"
        raise LineError("wrong number of fields", text)
    query_id, doc_id, score = fields
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
        # Judged, but without a relevant document: trec_eval counts it as 0.
        if scores:
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
