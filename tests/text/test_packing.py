"""Padding and packing lose no token and mix no texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3_jax.text.packing import bucket_length, length_batches, pack_rows

ragged = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=30)


@given(ragged)
def test_length_batches_cover_every_row_once_within_the_budget(rows: list[list[int]]) -> None:
    seen: list[int] = []
    for batch in length_batches(rows, tokens=128, pad_id=0):
        assert batch.ids.size <= 128 or batch.ids.shape[0] == 1
        for row, ids, length in zip(batch.rows, batch.ids, batch.lengths, strict=False):
            assert ids[:length].tolist() == rows[row]
            assert not ids[length:].any()
        assert not batch.lengths[len(batch.rows) :].any()
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(rows)))


@given(ragged)
def test_packed_rows_hold_every_text_whole_with_its_own_positions(rows: list[list[int]]) -> None:
    packed = pack_rows(rows, [3] * len(rows), length=48, pad_id=0, row_multiple=4)
    assert packed.ids.shape[0] % 4 == 0
    for i, (row, column) in enumerate(packed.starts):
        at = np.flatnonzero(packed.segments[row] == i)
        assert at.tolist() == list(range(column, column + len(rows[i])))
        assert packed.ids[row, at].tolist() == rows[i]
        assert packed.positions[row, at].tolist() == list(range(3, 3 + len(rows[i])))
    assert (packed.segments >= 0).sum() == sum(map(len, rows))


def test_a_text_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="50 tokens"):
        pack_rows([[1] * 50], [0], length=48, pad_id=0, row_multiple=1)


@given(st.integers(1, 5000))
def test_buckets_are_few_and_close(length: int) -> None:
    bucket = bucket_length(length)
    assert length <= bucket <= max(16, length * 1.25, length + 15)


def test_batches_of_passages_waste_little_and_need_few_shapes() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.1, 0.5, 2000), 20, 520).astype(int)
    shapes = [
        batch.ids.shape
        for batch in length_batches([[1] * length for length in lengths], tokens=1024, pad_id=0)
    ]
    assert sum(rows * length for rows, length in shapes) < 1.07 * lengths.sum()
    assert len(set(shapes)) <= 26


def test_short_rows_do_not_fill_up_a_batch_of_long_ones() -> None:
    shapes = [
        batch.ids.shape for batch in length_batches([[1] * 500, *[[1] * 20] * 6], tokens=2048, pad_id=0)
    ]
    assert shapes == [(1, 512), (8, 32)]
