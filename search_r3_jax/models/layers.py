"""Layers of the decoder: linear layers with low-rank adapters over several texts, and norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from search_r3_jax.config import LoraConfig
from search_r3_jax.mesh import BATCH_AXES, TOKENS, axis_size, constrain, layer_spec

PRODUCT = "product"
"""Checkpoint name of the outputs of matrix products, for rematerialisation policies."""

LINEARS: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block; each can have an adapter."""


class LoraParam(nnx.Param):
    """A parameter that is trained while the base is frozen: an adapter's factor, or the embed token's row."""


class Linear(nnx.Module):
    """x [..., I] → [..., O] for several texts, with an optional bias and an optional low-rank adapter."""

    def __init__(
        self, name: str, inputs: int, outputs: int, *, bias: bool, lora: LoraConfig | None, rngs: nnx.Rngs
    ):
        self.name = name
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * inputs**-0.5)
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (outputs,)) * 0.02) if bias else None
        if lora is None:
            self.lora_a, self.lora_b, self.lora_scale, self.dropout = None, None, 0.0, 0.0
        else:
            self.lora_a = LoraParam(jax.random.normal(rngs.params(), (inputs, lora.rank)) * inputs**-0.5)
            self.lora_b = LoraParam(jnp.zeros((lora.rank, outputs)))
            self.lora_scale = lora.alpha / lora.rank
            self.dropout = lora.dropout

    def __call__(
        self, xs: Sequence[jax.Array], adapters: Sequence[bool], dropout_keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """Outputs of each text; `adapters` turns the adapter on, `dropout_keys` (or None) drop its inputs."""
        ys = []
        products = multiply(xs, self.kernel[...], layer_spec(self.name, "kernel"))
        for x, y, adapter, key in zip(xs, products, adapters, dropout_keys, strict=True):
            if self.bias is not None:
                y += self.bias[...].astype(x.dtype)
            if adapter and self.lora_a is not None and self.lora_b is not None:
                if key is not None and self.dropout > 0:
                    kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
                    x = jnp.where(kept, x / (1 - self.dropout), 0)
                y += (
                    low_rank(x, self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype))
                    * self.lora_scale
                )
            ys.append(checkpoint_name(y, PRODUCT))
        return ys


def multiply(xs: Sequence[jax.Array], w_io: jax.Array, spec: PartitionSpec) -> list[jax.Array]:
    """Each x [B,T,I] · W [I,O], in x's dtype.

    On the active mesh W, sharded as `spec`, is gathered once for all texts; its gradient is summed over them
    before the devices exchange it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return [x @ w_io.astype(x.dtype) for x in xs]
    return _multiply_on_mesh(tuple(xs), w_io.astype(xs[0].dtype), spec)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_on_mesh(xs: tuple[jax.Array, ...], w_io: jax.Array, spec: PartitionSpec) -> list[jax.Array]:
    return _multiply_forward(xs, w_io, spec)[0]


def _multiply_forward(
    xs: tuple[jax.Array, ...], w_io: jax.Array, spec: PartitionSpec
) -> tuple[list[jax.Array], tuple[tuple[jax.Array, ...], jax.Array]]:
    inputs, outputs = _features(spec)
    gathered_io = constrain(constrain(w_io, *spec), inputs, outputs)
    xs = tuple(constrain(x, *TOKENS, inputs) for x in xs)
    return [constrain(x @ gathered_io, *TOKENS, outputs) for x in xs], (xs, gathered_io)


def _multiply_backward(
    spec: PartitionSpec, saved: tuple[tuple[jax.Array, ...], jax.Array], gradients: list[jax.Array]
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    xs, gathered_io = saved
    inputs, outputs = _features(spec)
    gradients = [constrain(dy, *TOKENS, outputs) for dy in gradients]

    def product(*arrays: jax.Array) -> jax.Array:
        rows_mi, rows_mo = (
            jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in half])
            for half in (arrays[::2], arrays[1::2])
        )
        return rows_mi.T @ rows_mo

    # XLA alone would all-reduce the gradient, twice the bytes of a reduce-scatter.
    pairs = [array for pair in zip(xs, gradients, strict=True) for array in pair]
    return tuple(constrain(dy @ gathered_io.T, *TOKENS, inputs) for dy in gradients), reduce_scatter_sum(
        product, pairs, spec
    )


def _features(spec: PartitionSpec) -> tuple[str | None, str | None]:
    """Mesh axes of inputs and outputs when the matrix is gathered over "fsdp"."""
    inputs, outputs = (None if axis == "fsdp" else axis for axis in spec)
    return inputs, outputs


_multiply_on_mesh.defvjp(_multiply_forward, _multiply_backward)


@jax.custom_vjp
def low_rank(x: jax.Array, a_ir: jax.Array, b_ro: jax.Array) -> jax.Array:
    """x [..., I] · A · B, with a backward pass that transposes no [tokens, O] array."""
    return (x @ a_ir) @ b_ro


def _low_rank_forward(
    x: jax.Array, a_ir: jax.Array, b_ro: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    narrow = x @ a_ir
    return narrow @ b_ro, (x, narrow, a_ir, b_ro)


def _low_rank_backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, narrow, a_ir, b_ro = saved
    d_narrow = dy @ b_ro.T
    rows_mi, narrow_mr = x.reshape(-1, x.shape[-1]), narrow.reshape(-1, narrow.shape[-1])
    # Only rank-sized factors are transposed.
    d_b = narrow_mr.T @ dy.reshape(-1, dy.shape[-1])
    d_a = (d_narrow.reshape(-1, d_narrow.shape[-1]).T @ rows_mi).T
    return d_narrow @ a_ir.T, d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (arXiv 1910.07467); returns the input's dtype."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale[...].astype(x.dtype)


def reduce_scatter_sum(
    product: Callable[..., jax.Array], pairs: Sequence[jax.Array], spec: PartitionSpec
) -> jax.Array:
    """Sum `product(*pairs)` [I,O] over the tokens of all devices; the result is sharded as `spec`.

    `pairs` are x [B,T,I] and y [B,T,O] in turn. Each device sums its own tokens, then one reduce-scatter
    gives each device its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    token_axes = (*BATCH_AXES, "sequence")

    def tokens_over(x: jax.Array) -> tuple[Any, Any]:
        rows, tokens = (
            axes if x.shape[i] % axis_size(mesh, axes) == 0 else None for i, axes in enumerate(TOKENS)
        )
        return rows, tokens

    over = [tokens_over(x) for x in pairs]
    features = [axis if axis != "fsdp" else None for axis in spec]
    specs = tuple(PartitionSpec(*axes, features[i % 2]) for i, axes in enumerate(over))

    def local(*pairs: jax.Array) -> jax.Array:
        counted = list(pairs)
        for i in range(0, len(pairs), 2):
            # Replicated tokens, such as a shared prompt, are counted only by the first device that has them.
            shared = [axis for axis in token_axes if axis not in (*(over[i][0] or ()), over[i][1])]
            first = jnp.asarray(True)
            for axis in shared:
                first &= jax.lax.axis_index(axis) == 0
            counted[i] = jnp.where(first, pairs[i], 0)
        # The TPU compiler scatters rows only; it would all-reduce a sum that is scattered by columns.
        turned = tuple(spec).index("fsdp") == 1
        total = (
            product(*(y for pair in zip(counted[1::2], counted[::2], strict=True) for y in pair))
            if turned
            else product(*counted)
        )
        for groups in scatter_groups(mesh.shape["fsdp"]):
            total = jax.lax.psum_scatter(
                total, "fsdp", scatter_dimension=0, axis_index_groups=groups, tiled=True
            )
        return jax.lax.psum(
            total.T if turned else total, tuple(axis for axis in token_axes if axis != "fsdp")
        )

    # Replication is not checked: the sums above guarantee it.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*pairs)


def scatter_groups(size: int) -> list[list[list[int]]]:
    """Device groups of an axis for each phase of a reduce-scatter, at most four where that divides.

    The TPU compiler turns a reduce-scatter over all chips of a slice into an all-reduce, which moves twice as
    much; groups of four are not affected.
    """
    factors = list[int]()
    while size > 1:
        factors.append(next((factor for factor in (4, 2) if size % factor == 0), size))
        size //= factors[-1]
    devices = np.arange(math.prod(factors)).reshape(factors)
    return [np.moveaxis(devices, i, -1).reshape(-1, factor).tolist() for i, factor in enumerate(factors)]
