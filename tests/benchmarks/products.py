"""The matrix products of a decoder's layer alone, ours and torch: the bound of what a step can reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Rows of a product, and how often a portion runs those of a layer: about those of the decoder's forward pass.
ROWS, REPEATS = 4096, 30


def layer_shapes(folder: str) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's seven matrices."""
    config = json.loads((Path(folder) / "config.json").read_text())
    D, F, N = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    K, H = config["num_key_value_heads"], config.get("head_dim") or D // N
    return [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]


def gflop(folder: str) -> float:
    """10⁹ floating-point operations of a portion."""
    return 2e-9 * ROWS * REPEATS * sum(inputs * outputs for inputs, outputs in layer_shapes(folder))


def operands(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """An input [rows, I] and a matrix [I, O] for each of a layer's products."""
    generator = np.random.default_rng(0)
    return [
        (
            generator.normal(size=(ROWS, inputs)).astype(np.float32),
            generator.normal(size=(inputs, outputs)).astype(np.float32),
        )
        for inputs, outputs in layer_shapes(folder)
    ]


def our_products(folder: str, given: dict[str, Any]) -> Callable[[int], object]:
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(lambda x, w: x @ w)
    pairs = [(jnp.asarray(x), jnp.asarray(w)) for x, w in operands(folder)]

    def work(i: int) -> None:
        for _ in range(REPEATS):
            for x, w in pairs:
                multiply(x, w).block_until_ready()

    return work


def torch_products(folder: str, given: dict[str, Any]) -> Callable[[int], object]:
    import torch

    pairs = [(torch.tensor(x), torch.tensor(w.T.copy())) for x, w in operands(folder)]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(REPEATS):
                for x, w in pairs:
                    torch.nn.functional.linear(x, w)

    return work
