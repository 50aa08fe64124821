"""Config files: every field means what it means to `transformers`, or is refused by name."""

from typing import Any

import pytest
from helpers.tiny_models import torch_model
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from search_r3_jax.errors import UserError
from search_r3_jax.models.hf_config import config_from_hf


def fields_of(variant: str = "llama") -> dict[str, Any]:
    return torch_model(variant).config.to_dict()


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_defaults_of_every_family_are_read(config_class: type[Any]) -> None:
    theirs = config_class()
    ours = config_from_hf(theirs.to_dict(), "config.json")
    assert (ours.layers, ours.heads, ours.feed_forward) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.intermediate_size,
    )
    assert ours.windowed == ()


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("llama", {"model_type": "mamba"}, "model_type: 'mamba'"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias: True"),
    "seen from both sides": ("qwen2", {"is_causal": False}, "is_causal: False"),
    "unknown, but false": ("qwen3", {"use_moe": False}, "use_moe: this field is not known"),
    "half rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    "a field nobody knows": ("qwen3", {"num_experts": 8}, "num_experts: this field is not known"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type: 'longrope'",
    ),
    "unknown scaling field": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}},
        "mrope_section",
    ),
    "scaling without factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear"}},
        "factor: the field is missing",
    ),
    "no original length in the block": (
        "llama",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": None},
            "original_max_position_embeddings": 32,
        },
        "original_max_position_embeddings: None",
    ),
    "low above high": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        },
        "high_freq_factor",
    ),
    "chunked layers": (
        "qwen2",
        {"layer_types": ["chunked_attention"] * 3},
        "layer_types: 'chunked_attention'",
    ),
    "too few layer types": (
        "qwen2",
        {"layer_types": ["full_attention"]},
        "layer_types: has 1 entries for 3 layers",
    ),
    "window types without the switch": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 3},
        "use_sliding_window or sliding_window is not set",
    ),
    "window in a Llama": ("llama", {"use_sliding_window": True, "sliding_window": 8}, "no sliding window"),
    "window of a Llama without a switch": ("llama", {"sliding_window": 6}, "no sliding window"),
    "no size": ("llama", {"hidden_size": None}, "hidden_size: None"),
    "a negative size": ("llama", {"num_hidden_layers": -1}, "num_hidden_layers: -1"),
    "a size in words": ("llama", {"intermediate_size": "large"}, "intermediate_size: 'large'"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3"),
    "infinite theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        "rope_theta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_is_refused_by_name(case: str) -> None:
    family, change, message = BAD[case]
    with pytest.raises(UserError) as caught:
        config_from_hf(fields_of(family) | change, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    fields = fields_of()
    del fields["rms_norm_eps"]
    with pytest.raises(UserError, match="rms_norm_eps: the field is missing"):
        config_from_hf(fields, "config.json")


def test_published_configs_are_read() -> None:
    """Fields as they stand in the config files of published checkpoints, older spelling included."""
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    config = config_from_hf(llama, "config.json")
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_positions == 8192
    qwen = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = config_from_hf(qwen, "config.json")
    assert (config.head_dim, config.qkv_bias, config.windowed, config.rope_theta) == (128, True, (), 1e6)
