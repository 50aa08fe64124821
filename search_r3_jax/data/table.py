"""Reader of tables with a row per query and document; rows of one query are merged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from search_r3_jax.data.collection import Collection, Document, Query, usable_split_name
from search_r3_jax.data.holdout import hold_out
from search_r3_jax.data.jsonl import MAX_RELEVANCE, JudgedQuery, check_agreement, content_id
from search_r3_jax.data.table_fields import OF_DOCUMENT, Fields
from search_r3_jax.data.table_files import Row, Table
from search_r3_jax.errors import UserError
from search_r3_jax.lines import LineError, Problems, checked_string, shown

# What programs write for a value that is not there.
_NO_VALUE = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "#N/A"})
_UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, kw_only=True)
class TableContent:
    """What a table holds.

    Attributes:
        collections: split name → collection, all with the same documents.
        rows: number of rows that were used.
        unanswered: number of queries left out because no document is relevant to them.
    """

    collections: dict[str, Collection]
    rows: int
    unanswered: int


def read_table(
    table: Table, fields: Fields, problems: Problems, *, shares: Mapping[str, float], seed: int
) -> TableContent:
    """The queries and documents of a table.

    Queries with the same text, instruction and reasoning are one, under the first of their ids; so are
    documents with the same title and text. With `shares` the splits are drawn (`hold_out`), otherwise they
    are those that the table names. Raises UserError naming file and row.
    """
    if shares and (table.splits[1:] or "split" in fields):
        raise UserError(
            f"--split-{next(iter(shares))}: {table.where} has splits of its own; leave the flag out"
            + ("" if table.splits[1:] else ", or name the other columns with --fields")
        )
    reading = _Reading(fields=fields)
    rows = 0
    used = {column for columns in fields.values() for column in columns}
    for row in table.rows(used):
        with problems.at(row.where):
            reading.add(row, in_one_split=bool(shares))
            rows += 1
    documents = reading.named_documents(table.where)
    queries_of, unanswered = reading.named_queries(table.where, documents)
    if not queries_of:
        raise UserError(f"{table.where}: no row with a query and a document relevant to it; nothing to build")
    if shares:
        (queries,) = queries_of.values()
        bodies = {document.doc_id: document.body for document in documents.values()}
        queries_of = hold_out(queries, bodies, shares, seed)
    collections = {
        split: Collection(
            name=table.name, split=split, documents=tuple(documents.values()), queries=tuple(queries)
        )
        for split, queries in queries_of.items()
    }
    return TableContent(collections=collections, rows=rows, unanswered=unanswered)


@dataclass(kw_only=True)
class _Reading:
    """What was read so far; queries and documents are known by their content, ids of the table beside."""

    fields: Fields
    documents: dict[str, Document] = field(default_factory=dict)
    queries_of: dict[str, dict[str, JudgedQuery]] = field(default_factory=dict)
    query_ids: dict[str, str] = field(default_factory=dict)
    doc_ids: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row, *, in_one_split: bool) -> None:
        """Add a row; raises LineError, and then leaves no trace of it."""
        cells = _Cells(row=row, fields=self.fields)
        text = cells.text("query", required=True)
        instruction, reasoning = cells.text("instruction"), cells.text("reasoning")
        key = content_id(text, instruction, reasoning)
        query_id = cells.identifier("query_id")
        _check_same(self.query_ids, query_id, key, "query_id")
        split = "train" if in_one_split else cells.split()
        judged, relevant = cells.judged()
        doc_id = cells.identifier("doc_id")
        if doc_id:
            _check_same(self.doc_ids, doc_id, relevant, "doc_id")
        query = self.queries_of.get(split, {}).get(key) or JudgedQuery(
            query_id=key, text=text, instruction=instruction, reasoning=reasoning
        )
        query.add(judged)
        # After the last check: a bad row must leave no trace.
        self.queries_of.setdefault(split, {})[key] = query
        for each, (document, _) in judged.items():
            self.documents.setdefault(each, document)
        if query_id:
            self.query_ids.setdefault(query_id, key)
        if doc_id:
            self.doc_ids.setdefault(doc_id, relevant)

    def named_documents(self, where: str) -> dict[str, Document]:
        """Content id → document under its id."""
        first = _first_ids(self.doc_ids)
        named = {key: replace(each, doc_id=first.get(key, key)) for key, each in self.documents.items()}
        _check_distinct(where, "doc_id", [each.doc_id for each in named.values()])
        return named

    def named_queries(
        self, where: str, documents: Mapping[str, Document]
    ) -> tuple[dict[str, list[Query]], int]:
        """Split name → queries under their ids; and how many were left out: nothing is relevant to them."""
        first = _first_ids(self.query_ids)
        queries_of: dict[str, list[Query]] = {}
        unanswered = 0
        for split, judged in self.queries_of.items():
            for key, each in judged.items():
                query = each.query()
                if not query.positives:
                    unanswered += 1
                    continue
                positives = {documents[doc].doc_id: value for doc, value in query.positives.items()}
                negatives = tuple(documents[doc].doc_id for doc in query.negatives)
                named = replace(query, query_id=first.get(key, key), positives=positives, negatives=negatives)
                queries_of.setdefault(split, []).append(named)
        for queries in queries_of.values():
            _check_distinct(where, "query_id", [query.query_id for query in queries])
        return queries_of, unanswered


def _check_same(known: Mapping[str, str], given: str, content: str, name: str) -> None:
    if given and known.get(given, content) != content:
        raise LineError(
            "duplicate id",
            f"field {name!r}: {shown(given)} stood for another text before; ids must be unique",
        )


def _check_distinct(where: str, name: str, ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        raise UserError(f"{where}: {name}: an id is the hash that another text gets; leave the ids out")


def _first_ids(known: Mapping[str, str]) -> dict[str, str]:
    """Content → the first id that it was given."""
    first: dict[str, str] = {}
    for given, content in known.items():
        first.setdefault(content, given)
    return first


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """The cells of a row by field; raises LineError naming the column."""

    row: Row
    fields: Fields

    def text(self, name: str, *, required: bool = False) -> str:
        """A text without the spaces around it; empty where there is none."""
        if name not in self.fields:
            return ""
        (column,) = self.fields[name]
        return _text(self.row.cells.get(column), column, required=required)

    def identifier(self, name: str) -> str:
        """An id, which may be a whole number; empty where the table has none."""
        if name not in self.fields:
            return ""
        (column,) = self.fields[name]
        value = self.row.cells.get(column)
        # bool is a kind of int in Python.
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float) and value.is_integer():
            # A column with gaps, as pandas writes it.
            return str(int(value))
        return _text(value, column, required=True)

    def split(self) -> str:
        """The split that the row names, or that of its data set, or else `train`."""
        name = self.identifier("split") or self.row.split or "train"
        if not usable_split_name(name):
            remedy = "use letters, digits and '_', not 'all' or 'shared'"
            raise LineError("bad split name", f"split {shown(name)} is not usable; {remedy}")
        return name

    def judged(self) -> tuple[dict[str, tuple[Document, int]], str]:
        """Content id → document and relevance, and the content id of the row's (first) positive.

        A relevance of 0 or less makes a negative of it.
        """
        (column,) = self.fields["positive"]
        texts = list(_texts(self.row.cells.get(column), column, required=True))
        if len(texts) > 1 and (given := [name for name in OF_DOCUMENT if name in self.fields]):
            raise LineError(
                "several documents",
                f"field {column!r} holds {len(texts)} documents, but {given[0]} belongs to one; make rows of "
                "them",
            )
        title, relevance = self.text("title"), self._relevance()
        found = [(title, text, relevance) for text in texts]
        for column in self.fields.get("negative", ()):
            texts = _texts(self.row.cells.get(column), column, required=False)
            found += [("", text, 0) for text in texts]
        judged: dict[str, tuple[Document, int]] = {}
        for title, text, value in found:
            document = Document(doc_id=content_id(title, text), title=title, text=text)
            _, earlier = judged.setdefault(document.doc_id, (document, value))
            check_agreement(earlier, value)
        return judged, next(iter(judged))

    def _relevance(self) -> int:
        if "relevance" not in self.fields:
            return 1
        (column,) = self.fields["relevance"]
        value = self.row.cells.get(column)
        number = _number(value)
        if number is None or not number.is_integer() or number > MAX_RELEVANCE:
            raise LineError(
                "bad relevance",
                f"field {column!r} must be a whole number up to {MAX_RELEVANCE} (0: not relevant), got "
                f"{shown(str(value))}",
            )
        return max(0, int(number))


def _number(value: object) -> float | None:
    """A number, also one that is written out; None for anything else."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().casefold(), value)
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _texts(value: object, column: str, *, required: bool) -> Iterator[str]:
    """The texts of a cell, which may hold a list; none where it is empty and not required."""
    if isinstance(value, list | tuple) and value:
        for number, item in enumerate(value):
            yield _text(item, f"{column}[{number}]", required=True)
    elif text := _text(None if value in ([], ()) else value, column, required=required):
        yield text


def _text(value: object, name: str, *, required: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        # NaN is what typed columns with gaps hold.
        value = ""
    if isinstance(value, str) and _UNDECODED.search(value):
        raise LineError("not UTF-8", f"field {name!r} is not UTF-8; convert the file to UTF-8")
    text = checked_string(value, name).strip()
    if text and text not in _NO_VALUE:
        return text
    if required:
        what = f"is {text!r}, which stands for a missing value" if text else "is empty"
        raise LineError("empty text", f"field {name!r} {what}; fill it or remove the row")
    return ""
