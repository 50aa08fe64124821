"""The decoder on the TPU kernel, interpreted, against the decoder on the other backend."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_models as tiny
from helpers.jax_processes import run_processes

from search_r3_jax.config import ModelConfig
from search_r3_jax.models.attention import Backend
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.models.kv_block import EMPTY_POSITION

PROGRAM = Path(__file__).parents[1] / "helpers" / "splash_on_mesh.py"
CONFIG = dataclasses.replace(tiny.CONFIG, family="qwen3", vocab_size=128, qk_norm=True)


def hidden_and_gradient(config: ModelConfig, backend: Backend, dtype: Any) -> tuple[np.ndarray, Any]:
    """Two packed rows behind a shared prefix, more tokens than one tile holds."""
    generator = np.random.default_rng(0)
    decoder = Decoder(config, rngs=nnx.Rngs(0), attention=backend, compute_dtype=dtype)
    graph, params = nnx.split(decoder)
    T = 140
    prefix, ids = (
        jnp.asarray(generator.integers(0, 128, (1, 9))),
        jnp.asarray(generator.integers(0, 128, (2, T))),
    )
    positions = np.concatenate([np.arange(9, 99), np.arange(9, 59)])[None].repeat(2, axis=0).astype(np.int32)
    segments = (np.arange(T) >= 90).astype(np.int32)[None].repeat(2, axis=0)
    positions[1, 120:], segments[1, 120:] = EMPTY_POSITION, -1
    weights = jnp.asarray(
        generator.standard_normal((2, T, config.hidden_size)) * (positions != EMPTY_POSITION)[..., None],
        jnp.float32,
    )

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        decoder = nnx.merge(graph, params)
        _, shared = decoder(prefix, jnp.arange(9, dtype=jnp.int32)[None])
        hidden, _ = decoder(ids, jnp.asarray(positions), segments_bt=jnp.asarray(segments), contexts=[shared])
        return jnp.sum(hidden.astype(jnp.float32) * weights), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(hidden, np.float32)[positions != EMPTY_POSITION], nnx.to_pure_dict(gradient)


@pytest.mark.parametrize(
    "windowed",
    [
        pytest.param((), id="full", marks=pytest.mark.slow),
        pytest.param((True, False), id="window in one layer", marks=pytest.mark.slow),
    ],
)
def test_float32(windowed: tuple[bool, ...]) -> None:
    config = dataclasses.replace(CONFIG, sliding_window=30 if windowed else 0, windowed=windowed)
    expected, expected_gradient = hidden_and_gradient(config, "xla", jnp.float32)
    found, gradient = hidden_and_gradient(config, "splash", jnp.float32)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(assert_close_at_its_scale, gradient, expected_gradient)


def assert_close_at_its_scale(mine: jax.Array, expected: jax.Array) -> None:
    """A gradient is a sum over hundreds of tokens: its rounding goes with its largest entries."""
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_the_other_backend() -> None:
    exact, _ = hidden_and_gradient(CONFIG, "xla", jnp.float32)
    errors = {
        backend: np.abs(hidden_and_gradient(CONFIG, backend, jnp.bfloat16)[0] - exact).mean()
        for backend in ("xla", "splash")
    }
    assert errors["splash"] < 1.2 * errors["xla"]


def test_one_new_token_goes_the_plain_way() -> None:
    """A decoding step on either backend is the same computation, bit for bit."""
    results = []
    for backend in ("xla", "splash"):
        decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), attention=backend)
        _, plain = Decoder(CONFIG, rngs=nnx.Rngs(0))(
            jnp.ones((2, 8), jnp.int32), positions_from_lengths(jnp.array([8, 5]), 8)
        )
        results.append(decoder(jnp.ones((2, 1), jnp.int32), jnp.array([[8], [5]]), contexts=[plain])[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_on_a_mesh_every_device_has_its_rows_heads_and_queries() -> None:
    meshes = [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}]
    report = run_processes(PROGRAM, [json.dumps(meshes)], processes=1, devices=8, timeout=500)[0]
    assert report["devices"] == 8
    assert report["size"] > 1
    for sizes in meshes:
        assert report[json.dumps(sizes)] <= 1e-5
