"""Vectors in fewer bits, as sentence-transformers defines them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from search_r3_jax.errors import UserError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "uint8", "binary", "ubinary")


def quantize(
    vectors_ne: np.ndarray, precision: Precision, *, ranges_2e: np.ndarray | None = None
) -> np.ndarray:
    """Vectors [N,E] float32 in another precision.

    `int8`, `uint8` [N,E]: 256 steps between the least and the greatest value of each dimension. `ranges_2e`
    are those two, by default of these vectors; vectors of different ranges cannot be compared. `binary`,
    `ubinary` [N,⌈E/8⌉]: the signs, eight to a byte. Raises UserError for a single vector without ranges.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r}: give one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return vectors_ne
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors_ne > 0, axis=-1)
        # Shifted by a half of the range, as faiss and usearch store signed bytes.
        return bits if precision == "ubinary" else (bits ^ 128).view(np.int8)
    if ranges_2e is None:
        if len(vectors_ne) == 1:
            raise UserError(
                f"precision: {precision}: one vector has no range; give more texts, or `ranges` of the corpus"
            )
        ranges_2e = (
            np.stack([vectors_ne.min(axis=0), vectors_ne.max(axis=0)])
            if len(vectors_ne)
            else np.zeros((2, vectors_ne.shape[1]), np.float32)
        )
    if np.shape(ranges_2e) != (2, vectors_ne.shape[1]):
        raise UserError(
            f"ranges: shape {list(np.shape(ranges_2e))}: want the least and the greatest value of each "
            f"dimension, [2, {vectors_ne.shape[1]}]"
        )
    low_e, high_e = np.asarray(ranges_2e, np.float32)
    steps_e = (high_e - low_e) / 255
    steps_e = np.where(steps_e == 0, 1, steps_e)
    levels = np.clip(np.floor((vectors_ne - low_e) / steps_e), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
