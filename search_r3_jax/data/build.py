"""Steps of `data build`: read a source, check it and write it as a TFDS data set."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from search_r3_jax.console import print_line
from search_r3_jax.data.beir import find_splits, read_beir_splits
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, check_new_dataset
from search_r3_jax.data.jsonl import read_jsonl
from search_r3_jax.data.python_functions import python_functions
from search_r3_jax.errors import UserError
from search_r3_jax.lines import Problems


@dataclass(frozen=True, kw_only=True)
class FunctionCounts:
    """How many functions to draw for each split, and the seed of the draw."""

    seed: int
    train_functions: int
    dev_functions: int
    test_functions: int


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
