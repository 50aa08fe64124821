"""The architecture of a decoder, and the adapters on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EMBED_TOKEN = "<|embed_token|>"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained at.

    Attributes:
        kind: the scaling rule, named as in a checkpoint's config.
        factor: how many times longer positions may become.
        original_positions: the length before stretching (`llama3`, `yarn`).
        low_frequency: turns within that length below which a frequency is stretched (`llama3`).
        high_frequency: turns within that length above which a frequency is kept (`llama3`).
        beta_fast: turns within that length above which a frequency is kept (`yarn`).
        beta_slow: turns within that length below which a frequency is stretched (`yarn`).
        truncate: round the fading range to whole dimensions (`yarn`).
        attention_factor: cosines and sines are multiplied by it (`yarn`); 1 for the other kinds.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one decoder.

    Attributes:
        family: names of tensors and fields on import and export; it never changes the mathematics.
        vocab_size: V, rows of the embedding matrix, padding rows included.
        hidden_size: D, also the dimension of the embedding.
        feed_forward: F, width of the feed-forward layers.
        layers: L.
        heads: N, query heads.
        kv_heads: K, key and value heads.
        head_dim: H; it need not be D/N.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of RMSNorm.
        max_positions: longest sequence the model was trained for, in tokens.
        qkv_bias: biases on q, k and v (Qwen2).
        qk_norm: RMSNorm over H on q and k (Qwen3).
        tied_embeddings: logits use the embedding matrix.
        rope_scaling: None is plain rotary positions.
        sliding_window: positions a query sees in a windowed layer, its own included; 0 has no window.
        windowed: one flag a layer; empty where no layer has a window.
    """

    family: Literal["llama", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    windowed: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA).

    Attributes:
        rank: Rank of the adapters. 0 trains all parameters instead.
        alpha: The adapter's update is scaled by alpha / rank.
        dropout: Share of an adapter's inputs zeroed during training, in [0, 1).
        targets: Linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
