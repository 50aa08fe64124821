"""Steps of `data build`: read a source, check it and write it as a TFDS data set."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from search_r3_jax.console import print_line
from search_r3_jax.data.beir import find_splits, read_beir_splits
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, check_new_dataset
from search_r3_jax.data.holdout import check_shares
from search_r3_jax.data.jsonl import read_jsonl
from search_r3_jax.data.python_functions import python_functions
from search_r3_jax.data.table import TableContent, read_table
from search_r3_jax.data.table_fields import REQUIRED, match_fields, parse_fields, shown_fields
from search_r3_jax.data.table_files import open_table
from search_r3_jax.errors import UserError
from search_r3_jax.lines import Problems


@dataclass(frozen=True, kw_only=True)
class FunctionCounts:
    """How many functions to draw for each split, and the seed of the draw."""

    seed: int
    train_functions: int
    dev_functions: int
    test_functions: int


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How to read a table.

    Attributes:
        fields: what a column is, each NAME=COLUMN; empty: the columns that have our names.
        shares: split name → share of the queries to hold out, in the order of drawing.
        seed: of the draw.
    """

    fields: Sequence[str] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BuiltTable:
    """What was built of a table; `columns` says which column was taken for what."""

    collections: dict[str, Collection]
    content: TableContent
    columns: str


def build_beir(
    folder: Path, out: Path, *, splits: Sequence[str] = (), skip_bad: bool = False
) -> dict[str, Collection]:
    """Build `out` from a BEIR folder and return its collections; all splits by default.

    Raises UserError naming file and line. With `skip_bad`, bad lines are left out: the first few are named on
    standard error, then their number.
    """
    if not folder.is_dir():
        raise UserError(f"--input: {folder}: no such folder; give one in BEIR's layout")
    check_new_dataset(out)
    problems = Problems(skip_bad=skip_bad)
    try:
        collections = read_beir_splits(folder, splits or find_splits(folder), problems)
    finally:
        _report(problems)
    return _written(collections, out, {"kind": "beir"}, problems)


def build_jsonl(
    file: Path, out: Path, *, splits: Sequence[str] = (), skip_bad: bool = False
) -> dict[str, Collection]:
    """Build `out` from a .jsonl file; options and errors are those of `build_beir`."""
    if not file.is_file():
        raise UserError(f"--input: {file}: no such file; give a .jsonl or .jsonl.gz file")
    check_new_dataset(out)
    problems = Problems(skip_bad=skip_bad)
    try:
        collections = read_jsonl(file, problems)
    finally:
        _report(problems)
    return _written(_chosen(collections, splits, str(file)), out, {"kind": "jsonl"}, problems)


def build_table(
    source: Path,
    out: Path,
    *,
    options: TableOptions | None = None,
    splits: Sequence[str] = (),
    skip_bad: bool = False,
) -> BuiltTable:
    """Build `out` from a table: a file, a folder of `datasets`, or a data set of the hub.

    Other options and errors are those of `build_beir`.
    """
    options = options or TableOptions()
    check_shares(options.shares)
    given = parse_fields(options.fields)
    check_new_dataset(out)
    problems = Problems(skip_bad=skip_bad)
    try:
        wanted = [column for columns in given.values() for column in columns] or REQUIRED
        table = open_table(source, wanted, problems)
        fields = match_fields(given, table)
        content = read_table(table, fields, problems, shares=options.shares, seed=options.seed)
    finally:
        _report(problems)
    recorded: dict[str, object] = {"kind": "table", "fields": dict(fields)}
    if options.shares:
        recorded |= {"held_out": dict(options.shares), "seed": options.seed}
    collections = _written(_chosen(content.collections, splits, str(source)), out, recorded, problems)
    columns = shown_fields(fields) + (f", {table.note}" if table.note else "")
    return BuiltTable(collections=collections, content=content, columns=columns)


def build_python_functions(
    folder: Path | None, out: Path, *, counts: FunctionCounts, splits: Sequence[str] = ()
) -> dict[str, Collection]:
    """Build `out` from the Python packages in `folder`, by default those of this environment.

    Raises UserError when there are too few functions.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--input: {folder}: no such folder; give one that holds Python packages, or none for the "
            "installed ones"
        )
    check_new_dataset(out)
    collections = python_functions(
        seed=counts.seed,
        train_functions=counts.train_functions,
        dev_functions=counts.dev_functions,
        test_functions=counts.test_functions,
        roots=None if folder is None else [folder],
    )
    return _written(
        _chosen(collections, splits, "python-functions"),
        out,
        {"kind": "python-functions", **asdict(counts)},
        Problems(),
    )


def _chosen(
    collections: Mapping[str, Collection], splits: Sequence[str], where: str
) -> dict[str, Collection]:
    for split in splits:
        if split not in collections:
            raise UserError(
                f"--split: {where} has no split {split!r}; splits found: {', '.join(sorted(collections))}"
            )
    return {split: collections[split] for split in splits or collections}


def _written(
    collections: dict[str, Collection], out: Path, source: Mapping[str, object], problems: Problems
) -> dict[str, Collection]:
    # Sorted by name: the order of --split or of a file's lines must not change the data set.
    collections = {split: collections[split] for split in sorted(collections)}
    name = next(iter(collections.values())).name
    try:
        build_dataset(collections, out, name=name, source=source, skipped=problems.counts)
    except OSError as error:
        raise UserError(
            f"--out: {out}: cannot be written ({error.strerror or error}); make room or choose another"
        ) from error
    return collections


def _report(problems: Problems) -> None:
    for text in problems.listed:
        print_line(f"skipped: {text}", sys.stderr)
    if problems.counts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(problems.counts.items()))
        print(f"skipped {problems.counts.total()} in all: {reasons}", file=sys.stderr)
