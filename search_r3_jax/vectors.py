"""L2 normalisation of float32 vectors, on devices and on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def l2_normalize(x: jax.Array) -> jax.Array:
    """Normalise the last axis in float32; a zero vector stays zero and has a zero gradient."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))


def l2_normalize_numpy(x: np.ndarray) -> np.ndarray:
    """Normalise the last axis of an array on the host; a zero vector stays zero."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)
