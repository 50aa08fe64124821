"""Padding and packing lose no token and mix no texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3_jax.text.packing import bucket_length, encoding_passes, length_batches, pack_rows

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


def passes_of(rows: list[list[int]], *, tokens: int = 1024, shares: int = 1):
    """Passes that read each text's last state."""
    ends = [len(row) - 1 for row in rows]
    return list(encoding_passes(rows, ends, first_position=3, tokens=tokens, pad_id=0, shares=shares))


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=300), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_passes_hold_every_text_whole_once(rows: list[list[int]], shares: int) -> None:
    seen: list[int] = []
    for each in passes_of(rows, shares=shares):
        assert len(each.ids) % shares == 0
        for r, m in np.argwhere(each.texts >= 0):
            text = int(each.texts[r, m])
            at = np.flatnonzero(each.segments[r] == m)
            assert each.ids[r, at].tolist() == rows[text]
            assert each.positions[r, at].tolist() == list(range(3, 3 + len(rows[text])))
            assert each.columns[r, m] == at[-1]
            seen.append(text)
        padding = each.segments < 0
        assert not each.ids[padding].any()
        assert (each.positions[padding] == -1).all()
        assert (~padding).sum() == sum(len(rows[text]) for text in each.texts[each.texts >= 0])
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_passes_of_passages_waste_little_and_need_few_shapes(tokens: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.5, 2000), 20, 256).astype(int)
    shapes = [each.ids.shape for each in passes_of([[1] * length for length in lengths], tokens=tokens)]
    assert sum(rows * length for rows, length in shapes) < 1.05 * lengths.sum()
    assert len(set(shapes)) <= 3


@pytest.mark.parametrize("length", [24, 38, 70, 102, 134, 166, 200, 262, 300, 390, 520])
def test_texts_that_are_cut_to_one_length_waste_little(length: int) -> None:
    shapes = [each.ids.shape for each in passes_of([[1] * length] * 1000)]
    assert sum(rows * length for rows, length in shapes) < 1.15 * 1000 * length
    assert len(set(shapes)) <= 3


def test_small_calls_have_shapes_of_one_small_set() -> None:
    generator = np.random.default_rng(0)
    shapes = {
        each.ids.shape
        for _ in range(300)
        for each in passes_of([[1] * generator.integers(5, 250) for _ in range(generator.integers(1, 25))])
    }
    assert shapes <= {(1, 16 << n) for n in range(5)} | {(4, 256)}
