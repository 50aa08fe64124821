"""One decoder for Llama, Qwen2/2.5 and Qwen3: a Flax NNX module with stacked, scanned layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.mesh import BATCH_AXES, TOKENS, constrain
from search_r3_jax.models.attention import Backend, make_attention
from search_r3_jax.models.kv_block import EMPTY_POSITION, Attend, KVBlock
from search_r3_jax.models.layers import LINEARS, PRODUCT, Linear, LoraParam, RMSNorm
from search_r3_jax.models.rotary import rotary_tables, rotate

_LAYER_INPUT = "layer_input"
# The axes over which parameters are replicated.
_COPIES = ("slice", "data")
REMAT_POLICIES = {
    # Saved for the backward pass: each layer's input only; the same in the host's memory; or also the outputs
    # of matrix products. All three recompute norms, activations and attention scores, which cost little time
    # and are most of the memory.
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class _Attention(NamedTuple):
    """Attention of one text in one layer: rotary tables, `attend`, context blocks, and preceding texts."""

    rope: tuple[jax.Array, jax.Array]
    attend: Attend
    contexts: Sequence[tuple[jax.Array, jax.Array]]
    behind: tuple[int, ...]


class Layer(nnx.Module):
    """One decoder block over several texts at once: pre-norm attention and gated feed-forward, residual."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs):
        D, N, K, H, F = (
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.feed_forward,
        )

        def linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
            adapter = lora if lora is not None and name in lora.targets else None
            return Linear(name, inputs, outputs, bias=bias, lora=adapter, rngs=rngs)

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
        xs: Sequence[jax.Array],
        attentions: Sequence[_Attention],
        *,
        adapters: Sequence[bool],
        dropout_keys: Sequence[jax.Array | None],
    ) -> tuple[list[jax.Array], list[tuple[jax.Array, jax.Array]]]:
        """The new states [B,T,D] of each text, and its keys and values [B,T,K,H]."""
        split = [key if key is None else jax.random.split(key, len(LINEARS)) for key in dropout_keys]
        keys_of = [
            dict.fromkeys(LINEARS) if keys is None else dict(zip(LINEARS, keys, strict=True))
            for keys in split
        ]

        def project(linear: Linear, inputs: Sequence[jax.Array]) -> list[jax.Array]:
            return linear(inputs, adapters, [keys[linear.name] for keys in keys_of])

        hs = [self.attention_norm(x) for x in xs]
        attended, new_kv = list[jax.Array](), list[tuple[jax.Array, jax.Array]]()
        for q, k, v, attention in zip(
            project(self.q, hs), project(self.k, hs), project(self.v, hs), attentions, strict=True
        ):
            q, k, v = (x.reshape(*x.shape[:2], -1, self.config.head_dim) for x in (q, k, v))
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            # Scaling the scores here costs no extra rounding.
            q, k = rotate(q, attention.rope, scale=self.config.head_dim**-0.5), rotate(k, attention.rope)
            # Queries on one device attend to tokens on others.
            k, v = (constrain(x, BATCH_AXES, None, "tensor") for x in (k, v))
            new_kv.append((k, v))
            visible_kv = [*attention.contexts, *(new_kv[i] for i in attention.behind), (k, v)]
            attended.append(
                checkpoint_name(attention.attend(q, visible_kv), PRODUCT).reshape(*q.shape[:2], -1)
            )
        xs = [x + y for x, y in zip(xs, project(self.o, attended), strict=True)]
        hs = [self.feed_forward_norm(x) for x in xs]
        gated = [
            jax.nn.silu(gate) * up
            for gate, up in zip(project(self.gate, hs), project(self.up, hs), strict=True)
        ]
        return [x + y for x, y in zip(xs, project(self.down, gated), strict=True)], new_kv


class Text(NamedTuple):
    """Rows of tokens [B,T] to read, and the keys that they see besides their own.

    `positions_bt` int32 is `EMPTY_POSITION` at padding. The blocks in `contexts` (leading L) and the earlier
    texts of the list whose numbers are in `behind` are visible up to the query's position. A block of fewer
    rows is shared by consecutive rows: a KV cache, a shared prompt, or a chunk of a long prompt.
    `segments_bt` separates texts packed into one row; `context_segments_bt` selects segments of the contexts.
    With `adapters=False` the frozen base reads the text, without a gradient. Adapters drop inputs only if a
    `dropout_key` is given.
    """

    ids_bt: jax.Array
    positions_bt: jax.Array
    segments_bt: jax.Array | None = None
    contexts: Sequence[KVBlock] = ()
    behind: tuple[int, ...] = ()
    context_segments_bt: jax.Array | None = None
    adapters: bool = True
    dropout_key: jax.Array | None = None


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
        self.head = (
            None if config.tied_embeddings else nnx.Param(jax.random.normal(rngs.params(), (D, V)) * D**-0.5)
        )
        # The embed token's row is trained even when the rest of the base is frozen.
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
        """`read` of one text: its hidden states [B,T,D] and its keys and values as a block `[L,B,T,K,H]`."""
        return self.read(
            [
                Text(
                    ids_bt,
                    positions_bt,
                    segments_bt,
                    contexts,
                    (),
                    context_segments_bt,
                    adapters,
                    dropout_key,
                )
            ]
        )[0]

    def read(self, texts: Sequence[Text]) -> list[tuple[jax.Array, KVBlock]]:
        """Hidden states [B,T,D] after the final norm, and keys and values `[L,B,T,K,H]`, of each text.

        A text may see earlier texts of the list (`Text.behind`). One pass through the layers reads all texts:
        on a mesh each layer's weights are gathered once for all of them, and their gradients exchanged once.
        """
        windowed = self.config.windowed or (False,) * self.config.layers
        attends = [self._attends(text, [texts[i] for i in text.behind], any(windowed)) for text in texts]
        ropes = [rotary_tables(jnp.maximum(text.positions_bt, 0), self.config) for text in texts]
        adapters = [text.adapters for text in texts]
        graph, state = nnx.split(self.layers)

        def body(
            xs: list[jax.Array], scanned: Any
        ) -> tuple[list[jax.Array], list[tuple[jax.Array, jax.Array]]]:
            layer_state, contexts, is_windowed, keys = scanned

            def attend_of(full_attend: Attend, window_attend: Attend) -> Attend:
                if any(windowed) and not all(windowed):
                    return lambda q, blocks: jax.lax.cond(
                        is_windowed, window_attend, full_attend, q, list(blocks)
                    )
                return window_attend

            attentions = [
                _Attention(rope, attend_of(*attend), context, text.behind)
                for rope, attend, context, text in zip(ropes, attends, contexts, texts, strict=True)
            ]
            xs = [checkpoint_name(x, _LAYER_INPUT) for x in xs]
            xs, new_kv = nnx.merge(graph, layer_state)(xs, attentions, adapters=adapters, dropout_keys=keys)
            return [
                x if text.adapters else jax.lax.stop_gradient(x) for x, text in zip(xs, texts, strict=True)
            ], new_kv

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat])
        keys = [
            None if text.dropout_key is None else jax.random.split(text.dropout_key, self.config.layers)
            for text in texts
        ]
        blocks = [[(block.keys, block.values) for block in text.contexts] for text in texts]
        start = [self.embed(text.ids_bt, text.adapters) for text in texts]
        outputs, new_kv = jax.lax.scan(body, start, (state, blocks, jnp.asarray(windowed), keys))
        return [
            (self.final_norm(x), KVBlock(*keys_values, text.positions_bt, text.segments_bt))
            for x, keys_values, text in zip(outputs, new_kv, texts, strict=True)
        ]

    def _attends(self, text: Text, before: Sequence[Text], windows: bool) -> tuple[Attend, Attend]:
        """Attention of a text in layers without a window, and in layers with one."""
        seen = [(block.positions, block.segments) for block in text.contexts] + [
            (each.positions_bt, each.segments_bt) for each in before
        ]
        attend_to_all = make_attention(
            self.attention, text.positions_bt, text.segments_bt, seen, text.context_segments_bt
        )
        if not windows:
            return attend_to_all, attend_to_all
        window = self.config.sliding_window
        return attend_to_all, make_attention(
            self.attention,
            text.positions_bt,
            text.segments_bt,
            seen,
            text.context_segments_bt,
            window=window,
        )

    def embed(self, ids_bt: jax.Array, adapters: bool = True) -> jax.Array:
        """Input embeddings [B,T,D] in the compute dtype."""
        # The table's D is sharded over "fsdp", as are the rows. Each device looks up its part of D for its
        # neighbours' rows, then they exchange. Without this constraint XLA may gather the whole batch.
        x = constrain(
            self.embedding[...][constrain(ids_bt, _COPIES, "sequence")], _COPIES, "sequence", "fsdp"
        )
        x = constrain(x, *TOKENS)
        if adapters and self.embed_row is not None:
            x = jnp.where((ids_bt == self.embed_id)[..., None], self.embed_row[...], x)
        return x.astype(self.compute_dtype)

    def logits(self, hidden: jax.Array, adapters: bool = True) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]; call it only where logits are needed."""
        weight_dv = self.embedding[...].T if self.head is None else self.head[...]
        logits = jnp.matmul(hidden, weight_dv.astype(hidden.dtype), preferred_element_type=jnp.float32)
        row = self.embed_row if self.head is None else self.head_row
        if adapters and row is not None:
            column = jnp.matmul(hidden, row[...].astype(hidden.dtype), preferred_element_type=jnp.float32)
            logits = jnp.where(jnp.arange(logits.shape[-1]) == self.embed_id, column[..., None], logits)
        return logits


def positions_from_lengths(lengths_b: jax.Array, T: int, start: jax.Array | int = 0) -> jax.Array:
    """Positions [B,T] int32 of right-padded rows; `EMPTY_POSITION` past each length.

    Positions begin at `start`, a number or [B].
    """
    steps = jnp.arange(T, dtype=jnp.int32)[None, :]
    first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), lengths_b.shape)[:, None]
    return jnp.where(steps < lengths_b[:, None], first + steps, EMPTY_POSITION)
