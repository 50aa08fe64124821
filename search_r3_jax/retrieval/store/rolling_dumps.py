"""Dumps of a rolling index: the vectors that have changed since the dump before, or now and then all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.store.manifest import MANIFEST, VECTORS, verify, write_manifest
from search_r3_jax.retrieval.store.vector_files import (
    VectorDtype,
    chunks_of,
    open_vectors,
    write_vectors,
)

ROWS, ENCODED_AT = "rows.npy", "encoded_at.npy"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, kw_only=True)
class Dump:
    """One dump.

    Attributes:
        step: the checkpoint that it belongs to.
        rows: the rows [n] int32 that it holds.
        encoded_at: the step whose parameters encoded each, [n] int32.
        vectors: [n,E], memory-mapped.
    """

    step: int
    rows: np.ndarray
    encoded_at: np.ndarray
    vectors: np.ndarray

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, steps and vectors, a few megabytes at a time."""
        steps = chunks_of(self.encoded_at)
        yield from zip(chunks_of(self.rows), steps, chunks_of(self.vectors), strict=True)


def dump_folder(run: Path) -> Path:
    """Where a run keeps its dumps."""
    return run / "index" / "rolling"


def write_dump(
    run: Path,
    step: int,
    rows: np.ndarray,
    encoded_at: np.ndarray,
    vectors: Iterable[np.ndarray],
    *,
    shape: tuple[int, int],
    dtype: VectorDtype,
    corpus_hash: str,
) -> None:
    """Write the dump of a step, in place of one that is there; raises OSError when the disk refuses.

    `shape` is that of the index, (N, E); `vectors` come in blocks, in the order of `rows`.
    """
    folder = dump_folder(run)
    temporary = epath.Path(folder / f"{_TEMPORARY}{step}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    np.save(temporary / ROWS, rows.astype(np.int32))
    np.save(temporary / ENCODED_AT, encoded_at.astype(np.int32))
    write_vectors(temporary / VECTORS, vectors, (len(rows), shape[1]), dtype)
    fields = {"step": step, "rows": len(rows), "shape": list(shape), "dtype": dtype}
    write_manifest(temporary, {**fields, "corpus_hash": corpus_hash})
    target = folder / str(step)
    shutil.rmtree(target, ignore_errors=True)
    Path(temporary).rename(target)


def dump_steps(run: Path) -> list[int]:
    """The steps that have a dump, ascending."""
    folder = dump_folder(run)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def read_dumps(run: Path, step: int, *, shape: tuple[int, int], corpus_hash: str) -> list[Dump]:
    """The dumps that together are the index at `step`, in their order: a whole one, and those after it.

    Raises UserError where one is missing, damaged, or of another corpus or width.
    """
    steps = [each for each in dump_steps(run) if each <= step]
    if step not in steps:
        raise UserError(
            f"{dump_folder(run) / str(step)}: missing; --allow-config-change encodes the corpus anew"
        )
    found: list[Dump] = []
    for each in reversed(steps):
        dump = _read(run, each, shape=shape, corpus_hash=corpus_hash)
        found.insert(0, dump)
        if len(dump.rows) == shape[0]:
            return found
    raise UserError(f"{dump_folder(run)}: no whole dump; --allow-config-change encodes the corpus anew")


def rows_since_whole(run: Path, step: int, rows: int) -> int:
    """Rows in the dumps before `step`, back to the newest whole one, which has `rows`; all where none is."""
    held = 0
    for each in reversed([each for each in dump_steps(run) if each < step]):
        count = _count(run, each)
        if count >= rows:
            return held
        held += count
    return rows


def prune_dumps(run: Path, checkpoints: Sequence[int], rows: int) -> None:
    """Delete dumps that none of the checkpoints needs: those before the last whole one of the oldest."""
    needed = [each for each in dump_steps(run) if each <= min(checkpoints, default=0)]
    whole = [each for each in needed if _count(run, each) >= rows]
    for each in needed:
        if whole and each < whole[-1]:
            shutil.rmtree(dump_folder(run) / str(each), ignore_errors=True)


def discard_dumps_after(run: Path, step: int) -> None:
    """Delete the dumps of later steps: with other settings the run takes these steps anew."""
    for each in dump_steps(run):
        if each > step:
            shutil.rmtree(dump_folder(run) / str(each))


def _read(run: Path, step: int, *, shape: tuple[int, int], corpus_hash: str) -> Dump:
    folder = dump_folder(run) / str(step)
    manifest = verify(epath.Path(folder), step)
    if manifest["corpus_hash"] != corpus_hash or tuple(manifest["shape"]) != shape:
        raise UserError(f"{folder}: is of another corpus or width; give another --run")
    return Dump(
        step=step,
        rows=_array(folder / ROWS),
        encoded_at=_array(folder / ENCODED_AT),
        vectors=open_vectors(folder / VECTORS, manifest["dtype"]),
    )


def _count(run: Path, step: int) -> int:
    """Rows of a dump, as its manifest says; 0 for one without."""
    try:
        return int(json.loads((dump_folder(run) / str(step) / MANIFEST).read_text())["rows"])
    except (OSError, ValueError, KeyError):
        return 0


def _array(path: Path) -> np.ndarray[Any, Any]:
    return np.load(path, allow_pickle=False)
