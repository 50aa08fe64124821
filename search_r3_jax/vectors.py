"""L2 normalisation of float32 vectors, on devices and on the host, and the check for a direction."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.errors import EmbeddingError


def l2_normalize(x: jax.Array) -> jax.Array:
    """Normalise the last axis in float32; a zero vector stays zero and has a zero gradient."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))


def unit_vectors(x_ne: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """Rows normalised on the host; raises EmbeddingError as `require_directions` does."""
    require_directions(x_ne, name)
    return x_ne / np.linalg.norm(x_ne, axis=-1, keepdims=True)


def require_directions(vectors_ne: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """The vectors [N,E]; raises EmbeddingError for the first one without a direction, named by `name(row)`.

    A number in it is not finite, or all are zero. Everything that scores, writes or indexes vectors comes
    through here: their order would be that of the ids.
    """
    squares_n = _squares(require_finite(vectors_ne, name))
    _refuse(np.flatnonzero(squares_n == 0), "is zero", name)
    return vectors_ne


def has_direction(vectors_ne: np.ndarray) -> np.ndarray:
    """Which of the vectors are finite and not zero, [N] bool."""
    squares_n = _squares(vectors_ne)
    return np.isfinite(squares_n) & (squares_n > 0)


def require_finite(vectors_ne: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """The vectors [N,E]; raises EmbeddingError for the first one that is not finite, named by `name(row)`."""
    _refuse(np.flatnonzero(~np.isfinite(_squares(vectors_ne))), "holds numbers that are not finite", name)
    return vectors_ne


def _squares(vectors_ne: np.ndarray) -> np.ndarray:
    # Squares, not norms: one pass, and one number a row.
    x_ne = np.asarray(vectors_ne, np.float32)
    return np.einsum("ne,ne->n", x_ne, x_ne)


def _refuse(rows: np.ndarray, what: str, name: Callable[[int], str]) -> None:
    if len(rows):
        raise EmbeddingError(
            f"{name(int(rows[0]))}: its embedding {what}, so it cannot be compared; look for weights that "
            "diverged or that overflow"
        )
