"""The documents of a built data set, left on disk: a corpus larger than memory is read a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds

from search_r3_jax.data.collection import Document
from search_r3_jax.errors import UserError

RECORDS_A_READ = 1024


class StoredDocuments(Sequence[Document]):
    """Documents by row, each read when it is asked for; a slice is read at once, and iterating reads ahead a
    piece at a time."""

    def __init__(self, folder: Path, split: str):
        """`folder` is the part of a data set that `split` is in."""
        self._folder = folder
        # Any: a decorator of TFDS hides the signature of as_data_source from type checkers.
        builder: Any = tfds.builder_from_directory(folder)
        self._records = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, row: int) -> Document: ...

    @overload
    def __getitem__(self, row: slice) -> tuple[Document, ...]: ...

    def __getitem__(self, row: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(row, slice):
            return tuple(self._read(range(*row.indices(len(self)))))
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} documents")
        return next(iter(self._read(range(row % len(self), row % len(self) + 1))))

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self), RECORDS_A_READ):
            yield from self._read(range(start, min(start + RECORDS_A_READ, len(self))))

    def _read(self, rows: range) -> Iterator[Document]:
        if not rows:
            return
        for row, record in zip(rows, self._records.__getitems__(list(rows)), strict=True):
            # As our own builder writes them.
            if int(record["row"]) != row:
                raise UserError(
                    f"{self._folder}: record {row} is of row {int(record['row'])}; build the data set again"
                )
            yield document_of(record)


def document_of(record: Mapping[str, Any]) -> Document:
    """A document from its stored fields."""
    return Document(
        doc_id=record["doc_id"].decode(), title=record["title"].decode(), text=record["text"].decode()
    )
