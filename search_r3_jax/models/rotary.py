"""Rotary positions (Su et al., arXiv 2104.09864), scaled by `linear`, `llama3` or `yarn`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.config import ModelConfig, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position [H/2] float32, rounded once from float64."""
    plain_h = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain_h.astype(np.float32)
    if scaling.kind == "linear":
        return (plain_h / scaling.factor).astype(np.float32)
    keep_h = (
        _llama3_kept(plain_h, scaling) if scaling.kind == "llama3" else _yarn_kept(head_dim, theta, scaling)
    )
    return (plain_h * keep_h + plain_h / scaling.factor * (1 - keep_h)).astype(np.float32)


def _llama3_kept(plain_h: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that is kept, in [0, 1].

    1 for frequencies with many turns within the original length, 0 for few.
    """
    turns_h = scaling.original_positions * plain_h / (2 * math.pi)
    return np.clip((turns_h - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency), 0, 1)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The same for YaRN (Peng et al., arXiv 2309.00071, section 3.2): a ramp over dimensions."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal ends would divide by zero; published implementations use this width.
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)


def rotary_tables(positions_bt: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B,T,H/2] float32."""
    frequencies_h = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles_bth = positions_bt[..., None].astype(jnp.float32) * frequencies_h
    factor = config.rope_scaling.attention_factor if config.rope_scaling is not None else 1.0
    if factor == 1.0:
        return jnp.cos(angles_bth), jnp.sin(angles_bth)
    return jnp.cos(angles_bth) * factor, jnp.sin(angles_bth) * factor


def rotate(x_btnh: jax.Array, tables: tuple[jax.Array, jax.Array], *, scale: float = 1.0) -> jax.Array:
    """Rotate x by its positions, in float32, and multiply by `scale`; returns the input's dtype.

    The two halves of H are rotated against each other, the layout of `transformers`.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return (
        jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1) * scale
    ).astype(x_btnh.dtype)
