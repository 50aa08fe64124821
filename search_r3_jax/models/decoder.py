"""One decoder for the Llama, Qwen2/2.5 and Qwen3 families, as a Flax NNX module with stacked, scanned layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.mesh import BATCH_AXES, laid
from search_r3_jax.models.attention import NOTHING, Attend, Backend, KVBlock, plan_attention
from search_r3_jax.models.rotary import rotary_tables, rotate

_LAYER_INPUT, _PRODUCT = "layer_input", "product"
REMAT_POLICIES = {
    # What the backward pass finds saved: nothing but each layer's input, that input in the host's memory, or also what was multiplied by
    # weights. Norms, activations and attention scores are recomputed under all three: they cost little and are most of the memory.
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),
}


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block: what an adapter can be put on."""


class LoraParam(nnx.Param):
    """A parameter that learns while the base is frozen: an adapter's factor, or the embed token's row."""


class Linear(nnx.Module):
    """x [..., I] → [..., O], with an optional bias and an optional low-rank adapter."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * inputs**-0.5)
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (outputs,)) * 0.02) if bias else None
        if lora is None:
            self.lora_a, self.lora_b, self.lora_scale, self.dropout = None, None, 0.0, 0.0
        else:
            self.lora_a = LoraParam(jax.random.normal(rngs.params(), (inputs, lora.rank)) * inputs**-0.5)
            self.lora_b = LoraParam(jnp.zeros((lora.rank, outputs)))
            self.lora_scale = lora.alpha / lora.rank
            self.dropout = lora.dropout

    def __call__(self, x: jax.Array, adapters: bool, dropout_key: jax.Array | None = None) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if adapters and self.lora_a is not None and self.lora_b is not None:
            if dropout_key is not None and self.dropout > 0:
                kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0)
            y += low_rank(x, self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)) * self.lora_scale
        return checkpoint_name(y, _PRODUCT)


@jax.custom_vjp
def low_rank(x: jax.Array, a_ir: jax.Array, b_ro: jax.Array) -> jax.Array:
    """x [..., I] · A · B; its own backward pass, because the derived one transposes [tokens, O] arrays in memory."""
    return (x @ a_ir) @ b_ro


def _low_rank_forward(x: jax.Array, a_ir: jax.Array, b_ro: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
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


class Layer(nnx.Module):
    """One block: attention and a gated feed-forward, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs):
        D, N, K, H, F = config.hidden_size, config.heads, config.kv_heads, config.head_dim, config.feed_forward

        def linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
            adapter = lora if lora is not None and name in lora.targets else None
            return Linear(inputs, outputs, bias=bias, lora=adapter, rngs=rngs)

        self.config = config
        self.attention_norm = RMSNorm(D, config.norm_eps)
        self.q = linear("q", D, N * H, config.qkv_bias)
        self.k = linear("k", D, K * H, config.qkv_bias)
        self.v = linear("v", D, K * H, config.qkv_bias)
        self.q_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.o = linear("o", N * H, D)
        self.feed_forward_norm = RMSNorm(D, config.norm_eps)
        self.gate = linear("gate", D, F)
        self.up = linear("up", D, F)
        self.down = linear("down", F, D)

    def __call__(
        self,
        x_btd: jax.Array,
        *,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        contexts: Sequence[tuple[jax.Array, jax.Array]],
        adapters: bool,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        B, T, _ = x_btd.shape
        H = self.config.head_dim
        keys = (
            dict.fromkeys(LINEARS) if dropout_key is None else dict(zip(LINEARS, jax.random.split(dropout_key, len(LINEARS)), strict=True))
        )
        h = self.attention_norm(x_btd)
        q = self.q(h, adapters, keys["q"]).reshape(B, T, -1, H)
        k = self.k(h, adapters, keys["k"]).reshape(B, T, -1, H)
        v = self.v(h, adapters, keys["v"]).reshape(B, T, -1, H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        mixed = checkpoint_name(attend(q, [*contexts, (k, v)]), _PRODUCT)
        x_btd = x_btd + self.o(mixed.reshape(B, T, -1), adapters, keys["o"])
        h = self.feed_forward_norm(x_btd)
        gated = jax.nn.silu(self.gate(h, adapters, keys["gate"])) * self.up(h, adapters, keys["up"])
        x_btd = x_btd + self.down(gated, adapters, keys["down"])
        return x_btd, (k, v)


class Decoder(nnx.Module):
    """Token ids → final hidden states; `logits` is separate, so an embedding never pays for the vocabulary.

    With `lora` the base stays frozen and `adapters=False` runs it: the reference policy costs no second copy.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        embed_id: int | None = None,
        compute_dtype: jnp.dtype | type = jnp.float32,
        remat: str = "none",
        attention: Backend = "xla",
    ):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat
        self.attention: Backend = attention
        self.lora = lora
        self.embed_id = embed_id
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (V, D)) * 0.02)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(layer_rngs: nnx.Rngs) -> Layer:
            return Layer(config, lora=lora, rngs=layer_rngs)

        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(D, config.norm_eps)
        self.head = None if config.tied_embeddings else nnx.Param(jax.random.normal(rngs.params(), (D, V)) * D**-0.5)
        # The embed token's row learns also where everything else of the base is frozen.
        learns_row = lora is not None and embed_id is not None
        self.embed_row = LoraParam(jnp.zeros((D,))) if learns_row else None
        self.head_row = LoraParam(jnp.zeros((D,))) if learns_row and self.head is not None else None

    def __call__(
        self,
        ids_bt: jax.Array,
        positions_bt: jax.Array,
        *,
        segments_bt: jax.Array | None = None,
        contexts: Sequence[KVBlock] = (),
        context_segments_bt: jax.Array | None = None,
        adapters: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVBlock]:
        """Hidden states [B,T,D] after the final norm, and these tokens' own keys and values as a block `[L,B,T,K,H]`.

        `positions_bt` int32 is `NOTHING` at padding. Each block in `contexts` (leading L) is visible up to the query's position; a block
        of fewer rows is shared by consecutive rows. A KV cache is a block, a shared prompt is a block, a chunk of a long prompt is one.
        Texts packed into one row are told apart by `segments_bt`; `context_segments_bt` chooses among a block's segments.
        Adapters drop inputs only where a `dropout_key` is given.
        """
        x = self.embed(ids_bt, adapters)
        rope = rotary_tables(jnp.maximum(positions_bt, 0), self.config)
        attend_all = plan_attention(self.attention, positions_bt, segments_bt, contexts, context_segments_bt)
        windowed = self.config.windowed or (False,) * self.config.layers
        attend_near = attend_all
        if any(windowed):
            window = self.config.sliding_window
            attend_near = plan_attention(self.attention, positions_bt, segments_bt, contexts, context_segments_bt, window=window)
        graph, state = nnx.split(self.layers)

        def body(x: jax.Array, scanned):
            layer_state, keys_values, near, key = scanned
            layer = nnx.merge(graph, layer_state)
            x = checkpoint_name(x, _LAYER_INPUT)

            def attend(q: jax.Array, blocks: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
                if any(windowed) and not all(windowed):
                    return jax.lax.cond(near, attend_near, attend_all, q, list(blocks))
                return attend_near(q, blocks)

            return layer(x, rope=rope, attend=attend, contexts=keys_values, adapters=adapters, dropout_key=key)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat])
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.layers)
        blocks = [(block.keys, block.values) for block in contexts]
        x, (keys_out, values_out) = jax.lax.scan(body, x, (state, blocks, jnp.asarray(windowed), keys))
        return self.final_norm(x), KVBlock(keys_out, values_out, positions_bt, segments_bt)

    def embed(self, ids_bt: jax.Array, adapters: bool = True) -> jax.Array:
        """Input embeddings [B,T,D] in the compute dtype."""
        # The table's D lies over "fsdp", as rows do: every device looks up its part of D for its neighbours' rows, then they exchange.
        # Left to itself, XLA may gather the whole batch instead.
        x = laid(self.embedding[...][laid(ids_bt, "data")], "data", None, "fsdp")
        x = laid(x, BATCH_AXES)
        if adapters and self.embed_row is not None:
            x = jnp.where((ids_bt == self.embed_id)[..., None], self.embed_row[...], x)
        return x.astype(self.compute_dtype)

    def logits(self, hidden: jax.Array, adapters: bool = True) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]; call it only on positions somebody reads."""
        weight_dv = self.embedding[...].T if self.head is None else self.head[...]
        logits = jnp.matmul(hidden, weight_dv.astype(hidden.dtype), preferred_element_type=jnp.float32)
        row = self.embed_row if self.head is None else self.head_row
        if adapters and row is not None:
            column = jnp.matmul(hidden, row[...].astype(hidden.dtype), preferred_element_type=jnp.float32)
            logits = jnp.where(jnp.arange(logits.shape[-1]) == self.embed_id, column[..., None], logits)
        return logits


def positions_from_lengths(lengths_b: jax.Array, T: int, start: jax.Array | int = 0) -> jax.Array:
    """Positions [B,T] int32 of right-padded rows that begin at `start` (a number or [B]); `NOTHING` past each length."""
    steps = jnp.arange(T, dtype=jnp.int32)[None, :]
    first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), lengths_b.shape)[:, None]
    return jnp.where(steps < lengths_b[:, None], first + steps, NOTHING)
