"""Rotary frequencies and tables against `transformers`, for every kind of scaling."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from search_r3_jax.models.hf_config import config_from_hf
from search_r3_jax.models.rotary import inverse_frequencies, rotary_tables, rotate

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    # Llama 3.1 and 3.2.
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
    # Qwen2.5 and Qwen3 beyond 32k.
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
    },
    "yarn, every option": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
        "attention_factor": 1.25,
        "rope_theta": 10_000.0,
    },
    "yarn, two weights": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "rope_theta": 10_000.0,
    },
}


def their_config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_parameters=dict(scaling),
    )


@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_equal_transformers(kind: str) -> None:
    theirs = their_config(SCALINGS[kind])
    config = config_from_hf(theirs.to_diff_dict() | {"max_position_embeddings": 131_072}, "config.json")
    module = LlamaRotaryEmbedding(theirs)
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(ours, module.inv_freq.numpy(), rtol=1e-6)
    positions = np.array([[0, 1, 2, 17, 511, 2047]])
    cos, sin = module(torch.zeros(1, 6, 256), torch.tensor(positions))
    for mine, expected in zip(
        rotary_tables(jnp.asarray(positions, jnp.int32), config), (cos, sin), strict=True
    ):
        # At position 2047 an angle carries 2047 times the rounding of its frequency.
        np.testing.assert_allclose(np.asarray(mine), expected.numpy()[..., :32], atol=3e-4)
        np.testing.assert_allclose(np.asarray(mine)[:, :4], expected.numpy()[:, :4, :32], atol=3e-6)


def test_the_kinds_differ() -> None:
    found = {
        kind: config_from_hf(their_config(values).to_diff_dict() | {"max_position_embeddings": 1}, "")
        for kind, values in SCALINGS.items()
    }
    tables = {kind: inverse_frequencies(64, 10_000.0, config.rope_scaling) for kind, config in found.items()}
    kinds = list(tables)
    for i, first in enumerate(kinds):
        for second in kinds[i + 1 :]:
            assert np.abs(tables[first] / tables[second] - 1).max() > 0.05, (first, second)


def test_frequencies_are_the_float64_values_rounded_once() -> None:
    exact = 1_000_000.0 ** (-np.arange(64, dtype=np.longdouble) / 64)
    np.testing.assert_array_equal(inverse_frequencies(128, 1_000_000.0), exact.astype(np.float32))


def test_the_older_spelling_means_the_same() -> None:
    scaling = SCALINGS["llama3"]
    older = {name: value for name, value in scaling.items() if name not in ("rope_theta", "rope_type")} | {
        "type": "llama3"
    }
    base = their_config(SCALINGS["default"]).to_diff_dict() | {"max_position_embeddings": 131_072}
    base.pop("rope_parameters", None)
    old = config_from_hf(base | {"rope_theta": 500_000.0, "rope_scaling": older}, "config.json")
    new = config_from_hf(base | {"rope_parameters": scaling}, "config.json")
    assert old == new


def test_yarn_of_qwen3_takes_the_head_dim_of_the_config() -> None:
    theirs = Qwen3Config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_parameters=dict(SCALINGS["yarn"]),
    )
    config = config_from_hf(theirs.to_dict() | {"max_position_embeddings": 131_072}, "config.json")
    module = Qwen3RotaryEmbedding(theirs)
    np.testing.assert_allclose(
        inverse_frequencies(128, config.rope_theta, config.rope_scaling), module.inv_freq.numpy(), rtol=1e-6
    )
    assert config.rope_scaling is not None
    np.testing.assert_allclose(config.rope_scaling.attention_factor, module.attention_scaling, rtol=1e-12)


def test_rotation_equals_transformers() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 9, 4, 64)).astype(np.float32)
    theirs = their_config(SCALINGS["yarn"])
    config = config_from_hf(theirs.to_diff_dict() | {"max_position_embeddings": 131_072}, "config.json")
    positions = np.broadcast_to(np.arange(9), (2, 9))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions.copy()))
    queries = torch.tensor(x).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
    found = rotate(jnp.asarray(x), rotary_tables(jnp.asarray(positions, jnp.int32), config))
    np.testing.assert_allclose(np.asarray(found), expected.transpose(1, 2).numpy(), atol=2e-6)
