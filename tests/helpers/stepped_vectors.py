"""Vectors of documents that are another at every step, and known without a model."""

import numpy as np

DIM = 8


def vectors_of(rows: np.ndarray, step: int) -> np.ndarray:
    """The unit vector of each row under the parameters of a step."""
    found = [np.random.default_rng((int(row), step)).normal(size=DIM) for row in rows]
    found = np.array(found).reshape(-1, DIM)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
