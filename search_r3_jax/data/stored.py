"""Documents of a built data set that stay on disk, for a corpus larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds

from search_r3_jax.data.collection import Document, StoredCorpus
from search_r3_jax.data.corpus_facts import CorpusFacts, gather_facts, read_facts
from search_r3_jax.errors import UserError

EXAMPLES_PER_READ = 1024


class StoredDocuments(StoredCorpus):
    """Documents by row, read on access; slices are read at once, iteration reads ahead in pieces."""

    def __init__(self, folder: Path, split: str):
        """Open `split` of the data set part in `folder`."""
        self._folder, self._split = folder, split
        # Any: a decorator of TFDS hides the signature of as_data_source from type checkers.
        builder: Any = tfds.builder_from_directory(folder)
        self._examples = builder.as_data_source(split)

    @cached_property
    def facts(self) -> CorpusFacts:
        """Ids, hash and digests: as built with the data set; of one pass where a release before kept none."""
        path = facts_file(self._folder, self._split)
        if path.is_file():
            return read_facts(path)
        return gather_facts((document.doc_id, document.body) for document in self)

    def at(self, rows: Sequence[int]) -> tuple[Document, ...]:
        """The documents of these rows, in their order, read at once."""
        return tuple(self._read(rows))

    def __len__(self) -> int:
        return len(self._examples)

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
        for start in range(0, len(self), EXAMPLES_PER_READ):
            yield from self._read(range(start, min(start + EXAMPLES_PER_READ, len(self))))

    def _read(self, rows: Sequence[int]) -> Iterator[Document]:
        if not len(rows):
            return
        for row, example in zip(rows, self._examples.__getitems__(list(rows)), strict=True):
            # Our builder writes rows in order.
            if int(example["row"]) != row:
                raise UserError(
                    f"{self._folder}: example {row} is of row {int(example['row'])}; build the data set again"
                )
            yield document_of(example)


def facts_file(folder: Path, split: str) -> Path:
    """Where a data set keeps the facts of a corpus, in its part `folder`."""
    return folder / f"{split}.facts.npz"


def document_of(example: Mapping[str, Any]) -> Document:
    """Decode a document from its stored fields."""
    return Document(
        doc_id=example["doc_id"].decode(), title=example["title"].decode(), text=example["text"].decode()
    )
