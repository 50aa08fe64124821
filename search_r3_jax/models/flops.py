"""Floating-point operations of a decoder's mathematics, without recomputation."""

from __future__ import annotations

from search_r3_jax.config import LoraConfig, ModelConfig


def linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer."""
    D, F, queries, keys = (
        config.hidden_size,
        config.feed_forward,
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    )
    return {
        "q": (D, queries),
        "k": (D, keys),
        "v": (D, keys),
        "o": (queries, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }


def layers_flops(config: ModelConfig, tokens: int, attended: int) -> float:
    """One forward pass through all layers: 2 per weight and token, 4·N·H per attended pair of tokens."""
    weights = sum(inputs * outputs for inputs, outputs in linear_sizes(config).values())
    return config.layers * (2.0 * weights * tokens + 4.0 * config.heads * config.head_dim * attended)


def head_flops(config: ModelConfig, tokens: int) -> float:
    """Logits at `tokens` positions."""
    return 2.0 * config.hidden_size * config.vocab_size * tokens


def adapter_flops(config: ModelConfig, lora: LoraConfig, tokens: int) -> float:
    """One forward pass through the low-rank adapters."""
    sizes = linear_sizes(config)
    return config.layers * 2.0 * lora.rank * tokens * sum(sum(sizes[name]) for name in lora.targets)


def training_flops(config: ModelConfig, lora: LoraConfig, tokens: int, attended: int, read: int) -> float:
    """Forward and backward pass of one step that needs logits at `read` positions.

    The backward pass costs one forward pass for the gradient of the activations and another for that of the
    weights, which under LoRA only the adapters have. Attention has no weights: its backward pass costs two
    forward passes.
    """
    linear = layers_flops(config, tokens, 0) + head_flops(config, read)
    attention = layers_flops(config, 0, attended)
    if lora.rank == 0:
        return 3.0 * (linear + attention)
    return 2.0 * linear + 3.0 * (attention + adapter_flops(config, lora, tokens))
