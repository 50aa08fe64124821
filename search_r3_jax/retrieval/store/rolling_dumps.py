"""Dumps of a rolling index: the vectors that have changed since the dump before, or now and then all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


class RollingDumps:
    """The dumps of a run's index."""

    def __init__(self, run: Path, shape: tuple[int, int], dtype: VectorDtype, corpus_hash: str):
        """`shape` is that of the index, (N, E), and `dtype` that of its vectors."""
        self._folder, self._shape, self._corpus_hash = dump_folder(run), shape, corpus_hash
        self._dtype: VectorDtype = dtype

    def steps(self) -> list[int]:
        """The steps that have a dump, ascending."""
        return dump_steps(self._folder)

    def write(
        self, step: int, rows: np.ndarray, encoded_at: np.ndarray, vectors: Iterable[np.ndarray]
    ) -> None:
        """Write the dump of a step, in place of one that is there; raises OSError when the disk refuses.

        `vectors` come in blocks, in the order of `rows`.
        """
        temporary = epath.Path(self._folder / f"{_TEMPORARY}{step}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        np.save(temporary / ROWS, rows.astype(np.int32))
        np.save(temporary / ENCODED_AT, encoded_at.astype(np.int32))
        write_vectors(temporary / VECTORS, vectors, (len(rows), self._shape[1]), self._dtype)
        fields = {"step": step, "rows": len(rows), "shape": list(self._shape), "dtype": self._dtype}
        write_manifest(temporary, {**fields, "corpus_hash": self._corpus_hash})
        target = self._folder / str(step)
        shutil.rmtree(target, ignore_errors=True)
        Path(temporary).rename(target)

    def read(self, step: int) -> list[Dump]:
        """The dumps that together are the index at `step`, in their order: a whole one, and those after it.

        Raises UserError where one is missing, damaged, or of another corpus or width.
        """
        steps = [each for each in self.steps() if each <= step]
        if step not in steps:
            raise UserError(
                f"{self._folder / str(step)}: missing; --allow-config-change encodes the corpus anew"
            )
        found: list[Dump] = []
        for each in reversed(steps):
            found.insert(0, self._read(each))
            if len(found[0].rows) == self._shape[0]:
                return found
        raise UserError(f"{self._folder}: no whole dump; --allow-config-change encodes the corpus anew")

    def rows_since_whole(self, step: int) -> int:
        """Rows in the dumps before `step`, back to the newest whole one; all where there is none."""
        held = 0
        for each in reversed([each for each in self.steps() if each < step]):
            count = self._count(each)
            if count >= self._shape[0]:
                return held
            held += count
        return self._shape[0]

    def prune(self, checkpoints: Sequence[int]) -> None:
        """Delete dumps that none of the checkpoints needs: those before the last whole one of the oldest."""
        needed = [each for each in self.steps() if each <= min(checkpoints, default=0)]
        whole = [each for each in needed if self._count(each) >= self._shape[0]]
        for each in needed:
            if whole and each < whole[-1]:
                shutil.rmtree(self._folder / str(each), ignore_errors=True)

    def _read(self, step: int) -> Dump:
        folder = self._folder / str(step)
        manifest = verify(epath.Path(folder), step)
        if manifest["corpus_hash"] != self._corpus_hash or tuple(manifest["shape"]) != self._shape:
            raise UserError(f"{folder}: is of another corpus or width; give another --run")
        return Dump(
            step=step,
            rows=np.load(folder / ROWS, allow_pickle=False),
            encoded_at=np.load(folder / ENCODED_AT, allow_pickle=False),
            vectors=open_vectors(folder / VECTORS, manifest["dtype"]),
        )

    def _count(self, step: int) -> int:
        """Rows of a dump, as its manifest says; 0 for one without."""
        try:
            return int(json.loads((self._folder / str(step) / MANIFEST).read_text())["rows"])
        except (OSError, ValueError, KeyError):
            return 0


def dump_folder(run: Path) -> Path:
    """Where a run keeps its dumps."""
    return run / "index" / "rolling"


def dump_steps(folder: Path) -> list[int]:
    """The steps that have a dump in a folder of them, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def discard_dumps_after(run: Path, step: int) -> None:
    """Delete the dumps of later steps, which the run takes anew."""
    for each in dump_steps(dump_folder(run)):
        if each > step:
            shutil.rmtree(dump_folder(run) / str(each))
