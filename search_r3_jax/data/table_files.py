"""Readers of tables, a row at a time: CSV, TSV, Parquet, .jsonl, and data sets of the library `datasets`."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from search_r3_jax.errors import TransientError, UserError
from search_r3_jax.extras import require
from search_r3_jax.hub.reaching import unanswered
from search_r3_jax.lines import MAX_LINE_BYTES, LineError, Problems, parse_object, read_lines, shown

SEPARATORS = (",", ";", "\t", "|")
ROWS_PER_BATCH = 4096
_KINDS = re.compile(r"\.(csv|tsv|tab|jsonl|parquet)(\.gz)?$", re.IGNORECASE)
_WANTED = (
    "give a .csv, .tsv, .jsonl (each .gz or not) or .parquet file, a folder of save_to_disk of datasets, or "
    "the id of a data set on the Hugging Face hub"
)
# ORGANISATION/NAME, and :CONFIG where there are several.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Row(NamedTuple):
    """A row of a table: where it is, the split of the data set that it belongs to, cells by column."""

    where: str
    split: str | None
    cells: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose columns are known; its rows are read on demand.

    Attributes:
        where: what a message begins with: the file, folder or id.
        name: of the data set made of it.
        columns: in the order of the file.
        splits: of a data set that has its own.
        note: how the file was read, for people; empty where there was no choice.
        rows: reads the rows, with the cells of the given columns. A row without some of them lacks these
            cells.
    """

    where: str
    name: str
    columns: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]
    splits: tuple[str, ...] = ()
    note: str = ""


def open_table(source: Path, wanted: Collection[str], problems: Problems) -> Table:
    """The table in a file, in a folder of `datasets`, or on the hub.

    `wanted` are columns that are looked for: they tell the separator of a CSV file. Raises UserError naming
    the file.
    """
    kind = _KINDS.search(source.name)
    if kind and not source.is_dir():
        if not source.is_file():
            raise UserError(f"--input: {source}: no such file; {_WANTED}")
        name = source.resolve().name[: kind.start()]
        ending = kind[1].lower()
        if ending == "jsonl":
            return _json_table(source, name, problems)
        if ending != "parquet":
            return _csv_table(source, name, wanted, problems)
        if not kind[2]:
            return _parquet_table(source, name)
    if source.is_dir() and any((source / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _datasets_table(source, source.resolve().name)
    if source.exists():
        raise UserError(f"--input: {source}: is no table; {_WANTED}")
    if _HUB_ID.fullmatch(str(source)) and not (kind or _is_local(source)):
        return _datasets_table(source, source.name.partition(":")[0])
    raise UserError(f"--input: {source}: no such file or folder; {_WANTED}")


def _is_local(source: Path) -> bool:
    """Whether ORGANISATION/NAME is rather the mistyped path of a file: the hub is not asked about it."""
    return Path(source.parts[0]).exists() or source.parts[0] in (".", "..")


def _csv_table(path: Path, name: str, wanted: Collection[str], problems: Problems) -> Table:
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _csv_lines(path, Problems())
    header = next((line for line in lines if line.strip()), "").strip("\n")
    if not header:
        raise UserError(f"{path}: is empty; a table begins with a line of column names")
    if re.search("[\0\ud800-\udfff]", header):
        raise UserError(f"{path}: not UTF-8; convert the file to UTF-8")
    if "\r" in header:
        raise UserError(f"{path}: lines end in carriage returns alone; end them with a line feed")
    separator = _separator(path, header, wanted)
    _, columns = next(_records(path, separator, problems), ("", list[str]()))
    columns = [column.strip() for column in columns]

    def rows(used: Collection[str]) -> Iterator[Row]:
        for where, cells in itertools.islice(_records(path, separator, problems), 1, None):
            with problems.at(where):
                if len(cells) != len(columns):
                    raise LineError(
                        "wrong number of fields",
                        f"{len(cells)} cells, and {len(columns)} columns; a cell that holds {separator!r} "
                        "belongs into double quotes",
                    )
                found = zip(columns, cells, strict=True)
                yield Row(where, None, {column: cell for column, cell in found if column in used})

    note = f"separated by {separator!r}"
    return Table(where=str(path), name=name, columns=tuple(columns), rows=rows, note=note)


def _csv_lines(path: Path, problems: Problems) -> Iterator[str]:
    # A cell in quotes may hold line ends, so that no line may be left out: bytes that are not UTF-8 stay.
    return (f"{line}\n" for _, line in read_lines(path, problems, blank=True, undecoded=True))


def _separator(path: Path, header: str, wanted: Collection[str]) -> str:
    """The one that makes the most of the wanted columns out of the header, or else the most columns."""
    names = {name.casefold() for name in wanted}

    def worth(separator: str) -> tuple[int, int]:
        columns = next(csv.reader([header], delimiter=separator), [])
        return len(names & {column.strip().casefold() for column in columns}), len(columns)

    is_tab = re.search(r"\.(tsv|tab)(\.gz)?$", path.name, re.IGNORECASE)
    return max(("\t", *SEPARATORS) if is_tab else SEPARATORS, key=worth)


def _records(path: Path, separator: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """`(where, cells)` of the header and of each row; `where` is the line that it begins in."""
    reader = csv.reader(_csv_lines(path, problems), delimiter=separator, strict=True)
    is_header = True
    while True:
        start = reader.line_num + 1
        where, cells = f"{path}, line {start}", list[str]()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > start:
                where = f"{path}, lines {start} to {reader.line_num}"
            if "unexpected end" in str(error):
                # Not to be skipped: what is lost is the rest of the file.
                raise UserError(
                    f"{where}: a quote is opened and never closed; close it or double it"
                ) from None
            with (Problems() if is_header else problems).at(where):
                raise _mistake(error) from None
        if cells:
            is_header = False
            yield where, cells


def _mistake(error: csv.Error) -> LineError:
    if "new-line" in str(error):
        return LineError(
            "bad line end",
            "a carriage return outside of quotes; end lines with a line feed, or quote the cell",
        )
    if "limit" in str(error):
        return LineError("cell too long", f"a cell of more than {MAX_LINE_BYTES} bytes; shorten it")
    return LineError(
        "bad quotes", "text behind a closing quote; double the quotes within a cell that stands in quotes"
    )


def _json_table(path: Path, name: str, problems: Problems) -> Table:
    records: list[tuple[str, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for where, line in read_lines(path, problems):
        with problems.at(where):
            fields = parse_object(line)
            records.append((where, fields))
            columns.update(dict.fromkeys(fields))

    def rows(used: Collection[str]) -> Iterator[Row]:
        return (Row(where, None, fields) for where, fields in records)

    return Table(where=str(path), name=name, columns=tuple(columns), rows=rows)


def _parquet_table(path: Path, name: str) -> Table:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    def refused(error: Exception) -> UserError:
        return UserError(f"{path}: cannot be read as Parquet ({_one_line(error)}); write it again")

    try:
        file = ParquetFile(path)
        columns = tuple(file.schema_arrow.names)
    except (OSError, pyarrow.ArrowException) as error:
        raise refused(error) from None

    def rows(used: Collection[str]) -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=list(used)):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", None, cells)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, after row {number}: not UTF-8 ({error.reason}); write it again"
            ) from None
        except (OSError, pyarrow.ArrowException) as error:
            raise refused(error) from None

    return Table(where=str(path), name=name, columns=columns, rows=rows)


def _datasets_table(source: Path, name: str) -> Table:
    require("data build", "datasets", "datasets")
    parts = _load_parts(source)
    splits = tuple(split for split in parts if split is not None)
    first, *others = parts.values()
    columns = tuple(
        column for column in first.column_names if all(column in part.column_names for part in others)
    )

    def rows(used: Collection[str]) -> Iterator[Row]:
        for split, part in parts.items():
            where = f"{source}, {split}" if split else str(source)
            # Other columns may hold pictures or sound, which would be decoded.
            for number, cells in enumerate(part.select_columns(list(used)), start=1):
                yield Row(f"{where}, row {number}", split, cells)

    return Table(where=str(source), name=name, columns=columns, rows=rows, splits=splits)


def _load_parts(source: Path) -> dict[str | None, Any]:
    """Split name → data set, by `datasets`; one that is no dictionary has no name."""
    try:
        # Within: some versions of what it imports fail to.
        import datasets

        if source.is_dir():
            loaded = datasets.load_from_disk(str(source))
        else:
            hub_id, _, config = str(source).partition(":")
            loaded = datasets.load_dataset(hub_id, name=config or None)
    # Any: the library lets errors of many others through.
    except Exception as error:
        if source.is_dir():
            raise UserError(
                f"{source}: cannot be read by datasets ({_one_line(error)}); save it again"
            ) from None
        reason = unanswered(error)
        if reason is not None:
            raise TransientError(f"--input: {source}: {reason}") from None
        raise UserError(
            f"--input: {source}: no such file, and no data set of the Hugging Face hub can be read "
            f"({_one_line(error)}); {_WANTED}"
        ) from None
    parts: dict[str | None, Any] = {None: loaded}
    if isinstance(loaded, dict):
        parts = {str(split): part for split, part in loaded.items()}
    if not parts:
        raise UserError(f"{source}: has no splits; save it again")
    return parts


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


def listed(columns: Sequence[str], most: int = 20) -> str:
    """Names of columns for a message."""
    more = f" and {len(columns) - most} more" if len(columns) > most else ""
    return ", ".join(columns[:most]) + more
