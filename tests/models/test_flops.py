"""The count of operations against what the compiler counts, and against gradients it has to compute."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.tiny_models import CONFIG

from search_r3_jax.config import LoraConfig, ModelConfig
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.flops import adapter_flops, head_flops, layers_flops, training_flops
from search_r3_jax.models.lora import trainable_filter

# A compiler counts the body of a loop over layers once, so there is one layer; wide, so that norms and
# rotations do not show.
WIDE = dataclasses.replace(
    CONFIG, layers=1, hidden_size=256, feed_forward=512, heads=8, kv_heads=2, head_dim=32
)
B, T = 2, 64


def compiled_flops(function: Callable[..., Any], *arguments: Any) -> float:
    found = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert found is not None
    return float(found["flops"])


def decoder(config: ModelConfig, lora: LoraConfig) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0), lora=lora if lora.rank else None, embed_id=3)


def work(config: ModelConfig, lora: LoraConfig) -> tuple[Callable[..., jax.Array], nnx.State, nnx.State]:
    """The sum of all logits as a function of trainable and frozen parameters."""
    graph, params, frozen = nnx.split(decoder(config, lora), trainable_filter(decoder(config, lora)), ...)
    ids, lengths = jnp.ones((B, T), jnp.int32), jnp.full(B, T)

    def total(params: nnx.State, frozen: nnx.State) -> jax.Array:
        merged = nnx.merge(graph, params, frozen)
        hidden, _ = merged(ids, positions_from_lengths(lengths, T))
        return jnp.sum(jnp.square(merged.logits(hidden)))

    return total, params, frozen


@pytest.mark.parametrize("rank", [0, 8])
def test_a_forward_pass(rank: int) -> None:
    lora = LoraConfig(rank=rank)
    total, params, frozen = work(WIDE, lora)
    # The plain backend computes every pair of a row, whether it is attended to or not.
    expected = (
        layers_flops(WIDE, B * T, B * T * T) + head_flops(WIDE, B * T) + adapter_flops(WIDE, lora, B * T)
    )
    assert expected == pytest.approx(compiled_flops(total, params, frozen), rel=0.05)


@pytest.mark.parametrize("rank", [0, 8])
def test_forward_and_backward(rank: int) -> None:
    lora = LoraConfig(rank=rank)
    total, params, frozen = work(WIDE, lora)
    expected = training_flops(WIDE, lora, B * T, B * T * T, B * T)
    assert expected == pytest.approx(compiled_flops(jax.value_and_grad(total), params, frozen), rel=0.08)


def test_layers_count_each() -> None:
    deep = dataclasses.replace(WIDE, layers=7)
    assert layers_flops(deep, 10, 55) == 7 * layers_flops(WIDE, 10, 55)
