"""Attention on TPU with the splash kernel, a block-sparse flash attention, over concatenated blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, make_splash_mha
from jax.sharding import PartitionSpec

from search_r3_jax.mesh import BATCH_AXES, axis_size
from search_r3_jax.models.kv_block import Attend

TILE = 128
LARGEST_TILE = 512


def make_splash_attention(masks: Sequence[jax.Array]) -> Attend:
    """Attention under masks [b,T·share,S], one per block; skips tiles in which nothing is visible.

    The masks are data, not code, so one kernel serves a cache, a shared prompt, packed texts and a window.
    Off a TPU the kernel is interpreted.
    """
    B, T, _ = masks[-1].shape
    visible = jnp.concatenate([mask.reshape(B, T, -1) for mask in masks], axis=2)
    visible = jnp.pad(visible, ((0, 0), (0, -T % TILE), (0, -visible.shape[2] % TILE)))
    # A query that sees nothing would divide by zero; its unused result would still reach the gradients.
    visible = visible.at[:, :, 0].set(visible[:, :, 0] | ~jnp.any(visible, axis=2))
    sizes = _block_sizes(visible.shape[1] // _query_shares(visible.shape[1]), visible.shape[2])

    def kernel(interpret: bool) -> Callable[..., jax.Array]:
        def one_row(mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            # One mask serves all heads.
            prepared = make_splash_mha(
                mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
            )
            # The flag only names a profiler scope; under jit it has become an array, which an `if` inside
            # cannot read.
            prepared.fwd_mask_info = prepared.fwd_mask_info._replace(is_dynamic_mask=None)
            return jnp.asarray(prepared(q, k, v))

        return jax.vmap(one_row)

    def anywhere(*arrays: jax.Array) -> jax.Array:
        return jnp.asarray(jax.lax.platform_dependent(*arrays, tpu=kernel(False), default=kernel(True)))

    def run(q_btnh: jax.Array, keys_values: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
        H = q_btnh.shape[-1]
        k_bskh, v_bskh = (
            jnp.concatenate([_per_row(part, B) for part in parts], axis=1)
            for parts in zip(*keys_values, strict=True)
        )
        # The kernel wants heads first and whole tiles.
        q, k, v = _tiled(q_btnh), _tiled(k_bskh), _tiled(v_bskh)
        mixed = _on_each_device(anywhere, visible, q, k, v)
        return jnp.swapaxes(mixed[:, :, :T, :H], 1, 2).astype(q_btnh.dtype)

    return run


def _on_each_device(
    kernel: Callable[..., jax.Array], visible: jax.Array, *heads_first: jax.Array
) -> jax.Array:
    """Run the kernel on every device's rows, heads and queries, with all keys; XLA cannot shard a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(visible, *heads_first)
    # A single shared prompt is replicated: all devices read it.
    rows = BATCH_AXES if visible.shape[0] % axis_size(mesh, BATCH_AXES) == 0 else None
    queries = "sequence" if _query_shares(visible.shape[1]) > 1 else None
    query_spec, kv_spec = PartitionSpec(rows, "tensor", queries), PartitionSpec(rows, "tensor")
    specs = (PartitionSpec(rows, queries), query_spec, kv_spec, kv_spec)
    # Kernels do not declare over which axes their results are replicated.
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=query_spec, check_vma=False)(
        visible, *heads_first
    )


def _query_shares(T: int) -> int:
    """Number of devices of the active mesh that share the tiles of T queries."""
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else mesh.shape["sequence"]
    return shares if T // TILE % shares == 0 else 1


def _per_row(x: jax.Array, B: int) -> jax.Array:
    """A block's array repeated for each of B rows: the kernel cannot share one."""
    share = B // x.shape[0]
    if share == 1:
        return x
    return jnp.repeat(x, share, axis=0)


def _tiled(x_btnh: jax.Array) -> jax.Array:
    """[B,T,N,H] → [B,N,T′,H′], padded with zeros to whole tiles."""
    x = jnp.swapaxes(x_btnh, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % TILE), (0, -x.shape[3] % TILE)))


def _block_sizes(T: int, S: int) -> BlockSizes:
    q, kv = (next(size for size in (LARGEST_TILE, 256, TILE) if length % size == 0) for length in (T, S))
    return BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
