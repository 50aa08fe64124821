"""Padding and packing of token rows into a few fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LENGTH_STEP = 16
SHORTEST_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Right-padded rows: `ids` [B,T] int32, `lengths` [B] int32 (0 for a filler row).

    `rows` are the numbers of the input rows, without the fillers.
    """

    ids: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray


def bucket_length(length: int) -> int:
    """Padded length of a row: a multiple of 16 up to 256, then of 1/16 of the next power of two."""
    step = max(LENGTH_STEP, 1 << max(0, (length - 1).bit_length() - 4))
    return max(1, -(-length // step)) * step


def pad_rows(
    rows: Sequence[Sequence[int]], *, length: int, pad_id: int, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad rows: `(ids [count,length] int32, lengths [count] int32)`.

    Missing rows become fillers of length 0.
    """
    ids = np.full((count or len(rows), length), pad_id, dtype=np.int32)
    lengths = np.zeros(ids.shape[0], dtype=np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        lengths[i] = len(row)
    return ids, lengths


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Several texts per row; ids, positions and segments are [R,T] int32.

    `segments` numbers the texts (−1: padding); `starts` [N,2] holds row and column of each text.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    starts: np.ndarray


def pack_rows(
    rows: Sequence[Sequence[int]],
    first_positions: Sequence[int],
    *,
    length: int,
    pad_id: int,
    row_multiple: int,
) -> PackedRows:
    """Pack rows first-fit, longest first; text i counts its positions from `first_positions[i]`.

    Raises ValueError for a text longer than a row.
    """
    used: list[int] = []
    starts = np.zeros((len(rows), 2), dtype=np.int32)
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        size = len(rows[i])
        if size > length:
            raise ValueError(f"text {i} has {size} tokens, a row has {length}")
        row = next((r for r, taken in enumerate(used) if taken + size <= length), len(used))
        if row == len(used):
            used.append(0)
        starts[i] = row, used[row]
        used[row] += size
    R = -(-len(used) // row_multiple) * row_multiple
    ids = np.full((R, length), pad_id, dtype=np.int32)
    positions, segments = np.full((R, length), -1, dtype=np.int32), np.full((R, length), -1, dtype=np.int32)
    for i, (row, column) in enumerate(starts):
        at = slice(column, column + len(rows[i]))
        ids[row, at] = rows[i]
        positions[row, at] = first_positions[i] + np.arange(len(rows[i]))
        segments[row, at] = i
    return PackedRows(ids=ids, positions=positions, segments=segments, starts=starts)


def length_batches(rows: Sequence[Sequence[int]], *, tokens: int, pad_id: int) -> Iterator[PaddedBatch]:
    """Batches of rows of similar length, longest first, in few shapes.

    A batch has at most `tokens` padded tokens, or one row.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = bucket_length(int(lengths[order[start]]))
        capacity = max(1, tokens // length)
        # Sorted neighbours are nearly as long; a much shorter row goes into a later batch: its padding here
        # would cost more than a separate batch.
        taken = [
            i
            for i in order[start : start + capacity]
            if bucket_length(int(lengths[i])) >= SHORTEST_SHARE * length
        ]
        count = min(capacity, 1 << (len(taken) - 1).bit_length())
        ids, row_lengths = pad_rows([rows[i] for i in taken], length=length, pad_id=pad_id, count=count)
        yield PaddedBatch(ids=ids, lengths=row_lengths, rows=np.array(taken))
        start += len(taken)
