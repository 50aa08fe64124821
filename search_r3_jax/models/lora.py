"""Low-rank adapters (Hu et al., arXiv 2106.09685): trainable parameters, adding and merging."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import LoraConfig
from search_r3_jax.errors import UserError
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.layers import LINEARS, Linear, LoraParam


def trainable_filter(decoder: Decoder) -> type[nnx.Param]:
    """The variable type that training updates: adapters if there are any, else all parameters."""
    return LoraParam if decoder.lora is not None else nnx.Param


def add_lora(decoder: Decoder, lora: LoraConfig, *, seed: int) -> Decoder:
    """A decoder with fresh adapters (A random, B zero) and trainable embed rows; computes the same function.

    The base's arrays are shared, not copied. Raises UserError for an unknown target.
    """
    unknown = sorted(set(lora.targets) - set(LINEARS))
    if unknown:
        raise UserError(f"lora.targets: {unknown[0]!r} is no linear layer; use some of {', '.join(LINEARS)}")
    adapted = _empty_like(decoder, lora)
    nnx.update(adapted, nnx.state(decoder, nnx.Param))
    generator = np.random.default_rng(seed)
    for name in lora.targets:
        linear = getattr(adapted.layers, name)
        scale = np.float32(linear.lora_a.shape[1] ** -0.5)
        linear.lora_a.set_value(
            jnp.asarray(generator.standard_normal(linear.lora_a.shape, dtype=np.float32) * scale)
        )
        linear.lora_b.set_value(jnp.zeros(linear.lora_b.shape))
    if adapted.embed_row is not None:
        adapted.embed_row.set_value(decoder.embedding[...][decoder.embed_id])
    if adapted.head_row is not None and decoder.head is not None:
        adapted.head_row.set_value(decoder.head[...][:, decoder.embed_id])
    return adapted


def merge_lora(decoder: Decoder) -> Decoder:
    """A decoder without adapters that computes the same function.

    Each update is added to its kernel in float32; the embed rows are written into the tables.
    """
    if decoder.lora is None:
        return decoder
    merged = _empty_like(decoder, None)
    base = nnx.state(decoder, nnx.All(nnx.Param, nnx.Not(LoraParam)))
    nnx.update(merged, base)
    for name in decoder.lora.targets:
        linear = getattr(decoder.layers, name)
        getattr(merged.layers, name).kernel.set_value(linear.kernel[...] + _update_of(linear))
    if decoder.embed_row is not None:
        merged.embedding.set_value(decoder.embedding[...].at[decoder.embed_id].set(decoder.embed_row[...]))
    if decoder.head_row is not None and decoder.head is not None and merged.head is not None:
        merged.head.set_value(decoder.head[...].at[:, decoder.embed_id].set(decoder.head_row[...]))
    return merged


def _update_of(linear: Linear) -> jax.Array:
    """What an adapter adds to its kernels [L,I,O], float32."""
    if linear.lora_a is None or linear.lora_b is None:
        raise ValueError("this layer has no adapter")
    return (
        jnp.einsum("lir,lro->lio", linear.lora_a[...], linear.lora_b[...], precision="highest")
        * linear.lora_scale
    )


def _empty_like(decoder: Decoder, lora: LoraConfig | None) -> Decoder:
    def make() -> Decoder:
        return Decoder(
            decoder.config,
            rngs=nnx.Rngs(0),
            lora=lora,
            embed_id=decoder.embed_id,
            compute_dtype=decoder.compute_dtype,
            remat=decoder.remat,
            attention=decoder.attention,
        )

    return nnx.eval_shape(make)
