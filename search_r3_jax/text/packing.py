"""Padding and packing of token rows into a few fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LENGTH_STEP = 16
SHORTEST_SHARE = 0.75
# Texts that are encoded share rows of this length; those that are longer have rows of their `bucket_length`.
# A pass that needs one row only is as short as a power of two allows: few shapes serve small calls.
PACKED_ROW, SHORTEST_ROW = 256, 16
# From so many passes on, rows whose length fits the texts are worth more shapes, if they need so much less.
MANY_PASSES, FITTED_SHARE = 8, 0.9
# A row holds a text for every so many tokens, at most: each is a vector that every pass brings back.
_TOKENS_PER_TEXT, _TOKENS_PER_LONG_TEXT = 20, 64


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


@dataclass(frozen=True, kw_only=True)
class EncodingPass:
    """Texts packed into the R rows of one pass; ids, positions and segments are [R,T] int32.

    `segments` numbers the texts of a row (−1: padding). `columns` [R,M] int32 are where a state is read for
    each text; `texts` [R,M] numbers the texts (−1: no text).
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    columns: np.ndarray
    texts: np.ndarray


def row_length(text_tokens: int, *, fitted: bool = True) -> int:
    """Length of the rows in which texts of so many tokens are encoded.

    Where that is `fitted`, the `bucket_length` of as many texts as `PACKED_ROW` holds: those that are cut to
    one length would leave a part of each row empty. Otherwise `PACKED_ROW`.
    """
    if text_tokens > PACKED_ROW:
        return bucket_length(text_tokens)
    return bucket_length(PACKED_ROW // text_tokens * text_tokens) if fitted else PACKED_ROW


def texts_of_row(length: int) -> int:
    """Most texts of a row."""
    return max(1, length // (_TOKENS_PER_TEXT if length <= PACKED_ROW else _TOKENS_PER_LONG_TEXT))


def rows_of_pass(length: int, tokens: int) -> int:
    """Rows of a full pass of about so many tokens; two at least, for one row alone has another shape."""
    return max(2, tokens // length)


def encoding_passes(
    rows: Sequence[Sequence[int]],
    columns: Sequence[int],
    *,
    first_position: int,
    tokens: int,
    pad_id: int,
    shares: int = 1,
) -> Iterator[EncodingPass]:
    """Passes of about `tokens` padded tokens for each of `shares` devices, in few shapes.

    The state of text i is read at its `columns[i]`. Texts are packed best-fit, longest first.
    """
    packed = _packed([len(row) for row in rows], tokens, shares)
    for length in sorted(packed, reverse=True):
        waiting = packed[length]
        while waiting:
            count = _fitting_count(len(waiting), rows_of_pass(length, tokens) * shares, shares)
            taken, waiting = waiting[:count], waiting[count:]
            shape = count, _short_length(rows, taken) if count == shares else length
            yield _encoding_pass(rows, columns, taken, shape, first_position, pad_id)


def _packed(lengths: Sequence[int], tokens: int, shares: int) -> dict[int, list[list[int]]]:
    """Texts of each row, by the length of rows: fitted to the texts where that pays for more shapes."""
    plain = _fullest_rows(lengths, fitted=False)
    if sum(lengths) < MANY_PASSES * tokens * shares:
        return plain
    fitted = _fullest_rows(lengths, fitted=True)
    padded, plainly = (_padded_tokens(packed, tokens, shares) for packed in (fitted, plain))
    return fitted if padded < FITTED_SHARE * plainly else plain


def _padded_tokens(packed: Mapping[int, Sequence[object]], tokens: int, shares: int) -> int:
    """Tokens of all passes, padding included."""
    total = 0
    for length, rows in packed.items():
        waiting = len(rows)
        while waiting > 0:
            count = _fitting_count(waiting, rows_of_pass(length, tokens) * shares, shares)
            total, waiting = total + count * length, waiting - count
    return total


def _fullest_rows(lengths: Sequence[int], *, fitted: bool) -> dict[int, list[list[int]]]:
    """Texts of each row, by the length of rows: each text goes to the row that it leaves least room in."""
    by_length: dict[int, list[list[int]]] = {}
    # The rows with so much room; bit n of `rooms` says that there are some with n.
    with_room: dict[int, list[tuple[int, list[int]]]] = {}
    rooms = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[i]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            length, texts = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room = length = row_length(size, fitted=fitted)
            texts = list[int]()
            by_length.setdefault(length, []).append(texts)
        texts.append(i)
        if room > size and len(texts) < texts_of_row(length):
            with_room.setdefault(room - size, []).append((length, texts))
            rooms |= 1 << (room - size)
    return by_length


def _fitting_count(waiting: int, most: int, shares: int) -> int:
    """Rows of the next pass: `most`, or a power of four times less, at least a row for each of `shares`."""
    count = most
    while waiting <= count // 2 and count > shares:
        count = max(shares, count // shares // 4 * shares)
    return count


def _short_length(rows: Sequence[Sequence[int]], taken: Sequence[Sequence[int]]) -> int:
    """The least power of two that holds each row's texts, and has room for as many."""
    needed = max(sum(len(rows[i]) for i in texts) for texts in taken)
    length = max(SHORTEST_ROW, 1 << (needed - 1).bit_length())
    while texts_of_row(length) < max(map(len, taken)):
        length *= 2
    return length


def _encoding_pass(
    rows: Sequence[Sequence[int]],
    columns: Sequence[int],
    taken: Sequence[Sequence[int]],
    shape: tuple[int, int],
    first_position: int,
    pad_id: int,
) -> EncodingPass:
    ids = np.full(shape, pad_id, np.int32)
    positions, segments = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    most_texts = texts_of_row(shape[1])
    columns_rm = np.zeros((shape[0], most_texts), np.int32)
    texts_rm = np.full((shape[0], most_texts), -1, np.int64)
    for r, texts in enumerate(taken):
        start = 0
        for m, i in enumerate(texts):
            at = slice(start, start + len(rows[i]))
            ids[r, at] = rows[i]
            positions[r, at] = first_position + np.arange(len(rows[i]))
            segments[r, at] = m
            columns_rm[r, m], texts_rm[r, m] = start + columns[i], i
            start = at.stop
    return EncodingPass(ids=ids, positions=positions, segments=segments, columns=columns_rm, texts=texts_rm)
