"""Names of tensors in each model family, and the `config.json` of an export, as `transformers` has them."""

from __future__ import annotations

from typing import Any, Literal

from search_r3_jax.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Path in the decoder's layer → name under `model.layers.<i>.`, transposed or not (torch stores [out, in]).
LAYER_TENSORS: dict[tuple[str, str], tuple[str, bool]] = {
    ("attention_norm", "scale"): ("input_layernorm.weight", False),
    ("q", "kernel"): ("self_attn.q_proj.weight", True),
    ("k", "kernel"): ("self_attn.k_proj.weight", True),
    ("v", "kernel"): ("self_attn.v_proj.weight", True),
    ("q", "bias"): ("self_attn.q_proj.bias", False),
    ("k", "bias"): ("self_attn.k_proj.bias", False),
    ("v", "bias"): ("self_attn.v_proj.bias", False),
    ("q_norm", "scale"): ("self_attn.q_norm.weight", False),
    ("k_norm", "scale"): ("self_attn.k_norm.weight", False),
    ("o", "kernel"): ("self_attn.o_proj.weight", True),
    ("feed_forward_norm", "scale"): ("post_attention_layernorm.weight", False),
    ("gate", "kernel"): ("mlp.gate_proj.weight", True),
    ("up", "kernel"): ("mlp.up_proj.weight", True),
    ("down", "kernel"): ("mlp.down_proj.weight", True),
}


def layer_tensors(config: ModelConfig) -> dict[tuple[str, str], tuple[str, bool]]:
    """The rows of `LAYER_TENSORS` that a decoder with this config has."""
    absent = set()
    if not config.qkv_bias:
        absent |= {("q", "bias"), ("k", "bias"), ("v", "bias")}
    if not config.qk_norm:
        absent |= {("q_norm", "scale"), ("k_norm", "scale")}
    return {path: name for path, name in LAYER_TENSORS.items() if path not in absent}


def config_to_hf(config: ModelConfig, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """The `config.json` that `transformers` reads for this decoder."""
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "dtype": dtype,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope_to_hf(config.rope_scaling)
    if any(config.windowed):
        kinds = ["sliding_attention" if near else "full_attention" for near in config.windowed]
        first = config.windowed.index(True)
        fields |= {
            "use_sliding_window": True,
            "sliding_window": config.sliding_window,
            "max_window_layers": first,
            "layer_types": kinds,
        }
    return fields


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    fields = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
    if scaling.kind == "llama3":
        return fields | {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    return fields | {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "attention_factor": scaling.attention_factor,
    }
