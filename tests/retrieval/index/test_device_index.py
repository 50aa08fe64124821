"""The index on the devices: many devices find what exact search finds, and rows are replaced in place."""

from pathlib import Path

import numpy as np
import pytest
from helpers.index_versions import unit
from helpers.jax_processes import run_processes

from search_r3_jax.retrieval.index.device import DeviceIndex
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import recall_at_k

PROGRAM = Path(__file__).parents[2] / "helpers" / "device_index.py"
IDS = [f"d{row}" for row in range(90)]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 2)])
def test_many_devices_find_what_exact_search_finds(processes: int, devices: int) -> None:
    for report in run_processes(PROGRAM, [], processes=processes, devices=devices, timeout=300):
        assert report.pop("devices") == processes * devices
        # Each holds its share of 1,003 rows and of the padding only.
        assert report.pop("rows held") <= 1003 // processes + devices
        for dtype in ("float32", "bfloat16"):
            assert report.pop(f"{dtype} copies") == [3, 400, 1001]
            assert report.pop(f"{dtype} steps") == [5, 7, 9, 9, 7]
        assert len(report) == 8
        assert not any(report.values()), report


def test_rows_are_replaced_as_if_the_index_had_been_built_anew() -> None:
    vectors, index = unit(90), DeviceIndex(unit(90), IDS, 5, chunk_rows=16)
    generator = np.random.default_rng(0)
    for step in range(6, 12):
        rows = generator.permutation(90)[: int(generator.integers(0, 20))]
        vectors[rows] = unit(len(rows), seed=step)
        index.put(rows, vectors[rows], step)
        anew, asked = DeviceIndex(vectors, IDS, 5, chunk_rows=16), unit(9, seed=100 + step)
        for mine, other in zip(index.search(asked, 30), anew.search(asked, 30), strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(index.take(np.arange(90)), vectors)
        assert (index.encoded_at[rows] == step).all()


def test_approximate_search_reaches_its_recall() -> None:
    """On CPUs `approx_max_k` is exact or nearly so; on TPUs the target is its own promise."""
    vectors, asked = unit(5000), unit(64, seed=1)
    ids = [f"d{row}" for row in range(5000)]
    found = DeviceIndex(vectors, ids, 5, recall=0.99, chunk_rows=1024).search(asked, 10)[1]
    assert recall_at_k(found, ExactIndex(vectors, ids, 5).search(asked, 10)[1], 10) >= 0.99


def test_rows_that_cannot_be_put() -> None:
    index = DeviceIndex(unit(90), IDS, 5)
    with pytest.raises(IndexError, match="rows 3 to 90: want 0 to 89"):
        index.put(np.array([90, 3]), unit(2), 6)
    with pytest.raises(ValueError, match="no row twice"):
        index.put(np.array([3, 3]), unit(2), 6)
    with pytest.raises(ValueError, match="want"):
        index.put(np.array([3]), unit(2), 6)
    with pytest.raises(IndexError, match="rows -1 to -1"):
        index.take(np.array([-1]))
