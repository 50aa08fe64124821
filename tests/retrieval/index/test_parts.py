"""An index in parts finds what one index over all rows finds."""

import numpy as np
import pytest
from helpers.index_versions import unit
from helpers.platforms import needs_scann

from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.parts import PartsIndex, merge_top_k, part_ranges
from search_r3_jax.retrieval.index.scann import ScannIndex

N = 203
IDS = [f"d{row}" for row in range(N)]


def parts_of(vectors: np.ndarray, parts: int) -> list[tuple[int, ScannIndex]]:
    return [
        (start, ScannIndex.build(vectors[start:stop], IDS[start:stop], 5))
        for start, stop in part_ranges(len(vectors), parts)
    ]


@needs_scann
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_parts_find_what_exact_search_over_all_finds(parts: int) -> None:
    vectors = unit(N)
    # Copies in other parts: equal scores, told apart by their rows.
    vectors[[150, 190]] = vectors[3]
    index, whole = PartsIndex(parts_of(vectors, parts), vectors, IDS, 5), ExactIndex(vectors, IDS, 5)
    assert (index.kind, index.version, index.shape) == ("scann", 5, (N, 24))
    assert index.ids_hash == whole.ids_hash
    for queries, k in [(1, 5), (7, 20), (3, 150), (4, N), (2, N + 9), (0, 3)]:
        asked = unit(queries, seed=queries)
        (scores, rows), (exact_scores, exact_rows) = index.search(asked, k), whole.search(asked, k)
        np.testing.assert_array_equal(np.sort(rows), np.sort(exact_rows))
        np.testing.assert_allclose(scores, exact_scores, atol=1e-6)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int32)
    found = index.search(vectors[3:4], 3)[1]
    assert set(found[0].tolist()) == {3, 150, 190}
    wanted = np.array([N - 1, 0, 57, 0])
    np.testing.assert_array_equal(index.take(wanted), vectors[wanted])


@needs_scann
def test_shares_of_the_parts_merge_to_all_of_them() -> None:
    vectors, asked = unit(N), unit(9, seed=1)
    parts = parts_of(vectors, 5)
    shares = [PartsIndex(parts[process::3], vectors, IDS, 5) for process in range(3)]
    found = [share.search(asked, 60) for share in shares]
    scores_pqk, rows_pqk = (np.stack(arrays) for arrays in zip(*found, strict=True))
    merged = merge_top_k(scores_pqk, rows_pqk, 60)
    for mine, all_of_them in zip(merged, PartsIndex(parts, vectors, IDS, 5).search(asked, 60), strict=True):
        np.testing.assert_array_equal(mine, all_of_them)
    # Two of five parts hold fewer than 100 rows: the rest is filled up.
    scores, rows = shares[0].search(asked, 100)
    held = [row for start, part in parts[::3] for row in range(start, start + part.shape[0])]
    assert all(set(row[row >= 0].tolist()) == set(held) for row in rows)
    assert (np.isneginf(scores) == (rows < 0)).all()
    # A process without a part finds nothing.
    scores, rows = PartsIndex([], vectors, IDS, 5).search(asked, 4)
    assert (rows == -1).all()
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("seed", range(20))
def test_merged_results_are_those_of_a_stable_sort(seed: int) -> None:
    generator = np.random.default_rng(seed)
    P, Q, per, k = (int(generator.integers(1, high)) for high in (6, 4, 9, 25))
    # Few different scores: many ties within a part and across parts.
    scores = generator.integers(4, size=(P, Q, per)).astype(np.float32)
    rows = np.arange(P * per, dtype=np.int32).reshape(P, 1, per).repeat(Q, axis=1)
    kept = min(k, per)
    order = np.argsort(-scores, axis=2, kind="stable")[:, :, :kept]
    padding = ((0, 0), (0, 0), (0, k - kept))
    found_scores = np.pad(np.take_along_axis(scores, order, axis=2), padding, constant_values=-np.inf)
    found_rows = np.pad(np.take_along_axis(rows, order, axis=2), padding, constant_values=-1)
    # Parts in any order, as processes may be.
    shuffled = generator.permutation(P)
    merged_scores, merged_rows = merge_top_k(found_scores[shuffled], found_rows[shuffled], k)
    for query in range(Q):
        ranked = sorted(
            (-score, row)
            for score, row in zip(scores[:, query].ravel().tolist(), range(P * per), strict=True)
        )[:k]
        missing = k - len(ranked)
        assert merged_rows[query].tolist() == [row for _, row in ranked] + [-1] * missing
        assert merged_scores[query].tolist() == [-score for score, _ in ranked] + [-np.inf] * missing
    assert (merged_scores.dtype, merged_rows.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 3), (8, 4), (100, 7), (5, 5), (3, 8)])
def test_the_rows_of_all_parts_are_the_corpus(rows: int, parts: int) -> None:
    ranges = part_ranges(rows, parts)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in ranges]
    assert len(sizes) == min(parts, rows)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
