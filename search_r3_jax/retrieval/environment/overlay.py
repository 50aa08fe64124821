"""The overlay of document vectors fresher than the index, {row → (vector, step)}, with expiry."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search_r3_jax.retrieval.index.protocol import Index


class Overlay:
    """Fresh vectors over an index: a row's vector is the overlay's if present, else the index's."""

    def __init__(self, *, max_age: int):
        """`max_age` is in steps; 0 keeps a vector for one step only."""
        self._max_age = max_age
        self._entries: dict[int, tuple[np.ndarray, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, row: int) -> bool:
        return row in self._entries

    def put(self, step: int, rows: list[int], vectors: np.ndarray) -> None:
        """Store vectors [n,E] of rows [n], encoded with the parameters of `step`."""
        self._entries.update({row: (vector, step) for row, vector in zip(rows, vectors, strict=True)})

    def over(self, index: Index, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n] that ranking uses."""
        # A copy: the index may return a view of its memory.
        vectors = np.array(index.take(rows), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            if row in self._entries:
                vectors[place] = self._entries[row][0]
        return vectors

    def expire(self, step: int) -> None:
        """Drop vectors more than `max_age` steps older than `step`."""
        self._entries = {
            row: entry for row, entry in self._entries.items() if step - entry[1] <= self._max_age
        }

    def forget(self, rows: np.ndarray) -> None:
        """Drop the vectors of rows [n]: the index has fresher ones."""
        for row in rows.tolist():
            self._entries.pop(row, None)

    def keep_from(self, step: int) -> None:
        """Drop vectors older than an index of `step`."""
        self._entries = {row: entry for row, entry in self._entries.items() if entry[1] >= step}

    def state(self, dim: int) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: rows [n] int32, vectors [n,E] float32 of width `dim`, steps [n] int32."""
        entries = list(self._entries.values())
        return {
            "rows": np.array(list(self._entries), dtype=np.int32),
            "vectors": np.array([vector for vector, _ in entries], np.float32).reshape(-1, dim),
            "steps": np.array([step for _, step in entries], dtype=np.int32),
        }

    def restore(self, state: Mapping[str, np.ndarray], index: Index) -> None:
        """Resume from the arrays of `state`, without vectors older than the index.

        Raises ValueError on another corpus.
        """
        rows, vectors, steps = (np.asarray(state[name]) for name in ("rows", "vectors", "steps"))
        corpus_rows, dim = index.shape
        if (
            vectors.shape != (len(rows), dim)
            or len(steps) != len(rows)
            or np.any((rows < 0) | (rows >= corpus_rows))
        ):
            raise ValueError(
                f"overlay {vectors.shape} does not fit an index of {corpus_rows} rows of width {dim}"
            )
        entries = zip(rows.tolist(), vectors.astype(np.float32), steps.tolist(), strict=True)
        self._entries = {row: (vector, step) for row, vector, step in entries if step >= index.version}
