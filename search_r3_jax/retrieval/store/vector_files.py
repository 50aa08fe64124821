"""Vectors in .npy files, written and read in chunks.

bfloat16 is stored as its bits, because the format has no such type.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
from etils import epath

VectorDtype = Literal["float32", "bfloat16"]
# A few megabytes at the usual dimensions.
CHUNK_ROWS = 4096


def to_stored(vectors: np.ndarray, dtype: VectorDtype) -> np.ndarray:
    """Vectors [n,E] as they are stored: float32, or the bits of bfloat16 as uint16."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(vectors.astype(ml_dtypes.bfloat16)).view(np.uint16)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `to_stored`, without a copy."""
    return stored.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else stored


def stored_dtype(dtype: VectorDtype) -> np.dtype[Any]:
    """The dtype of the result of `to_stored`."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)


def chunks_of(vectors: np.ndarray, rows: int = CHUNK_ROWS) -> Iterator[np.ndarray]:
    """Vectors [N,E] in slices of at most `rows` rows."""
    for start in range(0, len(vectors), rows):
        yield vectors[start : start + rows]


def write_vectors(
    path: epath.PathLike, chunks: Iterable[np.ndarray], shape: tuple[int, int], dtype: VectorDtype
) -> None:
    """Write chunks [n,E] that add up to `shape` as one file, with one chunk in memory at a time.

    Raises OSError when the disk refuses.
    """
    header = {
        "descr": np.lib.format.dtype_to_descr(stored_dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    # Written, not memory-mapped: a full disk raises here, but kills the process in a mapping.
    with epath.Path(path).open("wb") as opened:
        # Any, because epath's type of an open file allows text.
        file = cast(Any, opened)
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(to_stored(chunk, dtype).data)


def open_vectors(path: epath.PathLike, dtype: str) -> np.ndarray:
    """Open vectors [N,E] of a local file of `write_vectors`, memory-mapped.

    Raises OSError or ValueError where it is damaged.
    """
    return from_stored(np.load(os.fspath(path), mmap_mode="r", allow_pickle=False), dtype)
