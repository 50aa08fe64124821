"""Which column of a table is what: `--fields`, or columns with our own names."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence

from search_r3_jax.data.table_files import Table, listed
from search_r3_jax.errors import UserError

REQUIRED = ("query", "positive")
OF_DOCUMENT = ("title", "relevance", "doc_id")
FIELDS = (*REQUIRED, "negative", *OF_DOCUMENT, "instruction", "reasoning", "split", "query_id")
# What other data sets call these columns, for the command that a message proposes.
_OFTEN = {
    "query": ("question", "search", "anchor", "sentence1", "prompt", "title"),
    "positive": ("answer", "document", "passage", "response", "context", "text", "sentence2", "code", "body"),
}

Fields = Mapping[str, tuple[str, ...]]
"""Field → its columns: one, and any number of `negative`."""


def parse_fields(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The fields of `--fields NAME=COLUMN …`; raises UserError that names what is wrong."""
    fields: dict[str, tuple[str, ...]] = {}
    for each in given:
        name, equals, column = each.partition("=")
        if not equals or not column:
            raise UserError(f"--fields: {each!r}: give NAME=COLUMN, such as query=question")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            meant = f"did you mean {near[0]}?" if near else f"the names are {', '.join(FIELDS)}"
            raise UserError(f"--fields: {each!r}: {name!r} is nothing that a column can be; {meant}")
        if name in fields and name != "negative":
            raise UserError(f"--fields: {name} is given twice; name one column")
        fields[name] = (*fields.get(name, ()), column)
    missing = [name for name in REQUIRED if name not in fields]
    if given and missing:
        raise UserError(f"--fields: {' and '.join(missing)} missing; add {_proposal(missing, ())}")
    return fields


def match_fields(given: Fields, table: Table) -> Fields:
    """The fields with the columns of a table; without any given, the columns that have our names.

    Raises UserError that lists the columns there are.
    """
    if not table.columns:
        raise UserError(f"{table.where}: has no columns; nothing to build from")
    columns = f"the columns are {listed(table.columns)}"
    fields = given or _own_names(table.columns)
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise UserError(
            f"{table.where}: no column {' and no column '.join(missing)}; {columns}; say which they are: "
            f"--fields {_proposal(REQUIRED, table.columns, fields)}"
        )
    for name, chosen in fields.items():
        for column in chosen:
            count = table.columns.count(column)
            if count == 1:
                continue
            if count > 1:
                raise UserError(f"{table.where}: {count} columns are called {column!r}; rename all but one")
            near = difflib.get_close_matches(column, table.columns, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--fields: {name}={column}: no such column; {meant}{columns}")
    return fields


def shown_fields(fields: Fields) -> str:
    """The fields as `--fields` takes them."""
    return " ".join(shlex.quote(f"{name}={column}") for name, chosen in fields.items() for column in chosen)


def _own_names(columns: Sequence[str]) -> Fields:
    fields: dict[str, tuple[str, ...]] = {}
    for name in FIELDS:
        same = tuple(column for column in columns if column.casefold() == name)
        if same:
            fields[name] = same[:1]
    return fields


def _proposal(names: Sequence[str], columns: Sequence[str], found: Fields | None = None) -> str:
    """`--fields` for a table, as far as the names of its columns tell."""
    proposed: dict[str, tuple[str, ...]] = {}
    for name in names:
        free = [column for column in columns if (column,) not in proposed.values()]
        likely = (column for often in _OFTEN[name] for column in free if often in column.casefold())
        proposed[name] = (found or {}).get(name) or (next(likely, "COLUMN"),)
    return shown_fields(proposed)
