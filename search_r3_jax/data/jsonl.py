"""Reader of .jsonl files of queries with their documents, gzipped or not: one object a line."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3_jax.data.collection import Collection, Document, Query, usable_split_name
from search_r3_jax.errors import UserError
from search_r3_jax.files import digest_of
from search_r3_jax.lines import (
    LineError,
    Problems,
    checked_string,
    filled_field,
    parse_object,
    read_lines,
    shown,
    string_field,
)

ID_CHARACTERS = 32
MAX_RELEVANCE = 2**31 - 1


def read_jsonl(path: Path, problems: Problems) -> dict[str, Collection]:
    """Split name → collection in the order of the file, all with the same documents.

    Lines with the same query and no `query_id` become one query with the documents of all of them. Raises
    UserError naming file and line.
    """
    documents: dict[str, Document] = {}
    queries_of: dict[str, dict[str, JudgedQuery]] = {}
    ids: set[str] = set()
    for where, line in read_lines(path, problems):
        with problems.at(where):
            fields = parse_object(line)
            query, judged = _read_query(fields), _read_judgements(fields)
            split = string_field(fields, "split", default="train")
            if not usable_split_name(split):
                remedy = "use letters, digits and '_', not 'all' or 'shared'"
                raise LineError("bad split name", f"field 'split': {shown(split)} is not usable; {remedy}")
            if "query_id" in fields and query.query_id in ids:
                raise LineError(
                    "duplicate id",
                    f"field 'query_id': {shown(query.query_id)} appears twice; ids must be unique",
                )
            judged_query = queries_of.get(split, {}).get(query.query_id, query)
            judged_query.add(judged)
            # After the last check: a bad line must leave no trace.
            queries_of.setdefault(split, {})[query.query_id] = judged_query
            ids.add(query.query_id)
            documents.update({document.doc_id: document for document, _ in judged.values()})
    if not queries_of:
        raise UserError(f"{path}: no queries; expected one JSON object a line, with 'query' and 'positive'")
    name = re.sub(r"(\.jsonl)?(\.gz)?$", "", path.resolve().name, flags=re.IGNORECASE)
    return {
        split: Collection(
            name=name,
            split=split,
            documents=tuple(documents.values()),
            queries=tuple(each.query() for each in queries.values()),
        )
        for split, queries in queries_of.items()
    }


@dataclass(kw_only=True)
class JudgedQuery:
    """A query and the relevance of its documents read so far; 0 is a negative."""

    query_id: str
    text: str
    instruction: str
    reasoning: str
    relevance: dict[str, int] = field(default_factory=dict)

    def add(self, judged: Mapping[str, tuple[Document, int]]) -> None:
        """Add the judgements of a line, all or none; raises LineError where they contradict earlier ones."""
        for doc_id, (_, relevance) in judged.items():
            check_agreement(self.relevance.get(doc_id, relevance), relevance)
        self.relevance.update({doc_id: relevance for doc_id, (_, relevance) in judged.items()})

    def query(self) -> Query:
        """The query with all its documents."""
        return Query(
            query_id=self.query_id,
            text=self.text,
            positives={doc_id: relevance for doc_id, relevance in self.relevance.items() if relevance > 0},
            negatives=tuple(doc_id for doc_id, relevance in self.relevance.items() if relevance == 0),
            instruction=self.instruction,
            reasoning=self.reasoning,
        )


def _read_query(fields: dict[str, Any]) -> JudgedQuery:
    text = filled_field(fields, "query")
    instruction = string_field(fields, "instruction", default="")
    reasoning = string_field(fields, "reasoning", default="")
    query_id = (
        filled_field(fields, "query_id") if "query_id" in fields else content_id(text, instruction, reasoning)
    )
    return JudgedQuery(query_id=query_id, text=text, instruction=instruction, reasoning=reasoning)


def _read_judgements(fields: dict[str, Any]) -> dict[str, tuple[Document, int]]:
    if "positive" not in fields:
        raise LineError("missing field", "field 'positive' is missing; add it")
    judged: dict[str, tuple[Document, int]] = {}
    for name, lowest, highest in (("positive", 1, MAX_RELEVANCE), ("negative", 0, 0)):
        for document, relevance in _documents(fields[name], name, lowest, highest) if name in fields else ():
            _, earlier = judged.setdefault(document.doc_id, (document, relevance))
            check_agreement(earlier, relevance)
    if not any(relevance > 0 for _, relevance in judged.values()):
        raise LineError("empty list", "field 'positive' is an empty list; name a document or remove the line")
    return judged


def check_agreement(earlier: int, relevance: int) -> None:
    """Raise LineError if a document of a query has two judgements."""
    if earlier != relevance:
        text = (
            f"a document of this query is judged twice, {earlier} and {relevance} (0 is a negative); "
            "leave one"
        )
        raise LineError("contradictory judgement", text)


def _documents(value: object, name: str, lowest: int, highest: int) -> Iterator[tuple[Document, int]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise LineError(
            "wrong type", f"field {name!r} must be a string or a list, got {type(value).__name__}"
        )
    for number, item in enumerate(value):
        yield _document(item, f"{name}[{number}]", lowest, highest)


def _document(item: object, name: str, lowest: int, highest: int) -> tuple[Document, int]:
    title, relevance = "", lowest
    if isinstance(item, dict):
        if "text" not in item:
            raise LineError("missing field", f"field '{name}.text' is missing; add it")
        text = checked_string(item["text"], f"{name}.text")
        title = checked_string(item.get("title", ""), f"{name}.title")
        relevance = item.get("relevance", lowest)
    else:
        text = checked_string(item, name)
    # bool is a kind of int in Python.
    if not isinstance(relevance, int) or isinstance(relevance, bool):
        raise LineError(
            "wrong type", f"field '{name}.relevance' must be an integer, got {type(relevance).__name__}"
        )
    if not lowest <= relevance <= highest:
        allowed = f"{lowest} to {highest}" if lowest < highest else f"{lowest}"
        raise LineError(
            "bad relevance",
            f"field '{name}.relevance' must be {allowed}; what is irrelevant belongs into 'negative'",
        )
    document = Document(doc_id=content_id(title, text), title=title, text=text)
    if not document.body.strip():
        raise LineError("empty text", f"field {name!r} is empty; fill it or remove it")
    return document, relevance


def content_id(*fields: str) -> str:
    """An id made of texts alone."""
    return digest_of(fields)[:ID_CHARACTERS]
