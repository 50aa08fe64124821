"""What each family calls its tensors and its config fields (the names of `transformers`)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError

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


def config_from_hf(fields: dict[str, Any], where: str) -> ModelConfig:
    """Our config of a `config.json`; raises UserError naming the field that this decoder does not support."""
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"{where}: model_type: {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UserError(f"{where}: rope_scaling: {kind!r} is not supported; use a checkpoint with plain rotary positions")
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act: {fields['hidden_act']!r} is not supported; only 'silu' is")
    if family == "llama" and (fields.get("attention_bias") or fields.get("mlp_bias")):
        raise UserError(f"{where}: attention_bias: Llama with biases is not supported; use a checkpoint without")
    if fields.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window: sliding windows are not supported; set it to false")
    try:
        heads = fields["num_attention_heads"]
        return ModelConfig(
            family=family,
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            feed_forward=fields["intermediate_size"],
            layers=fields["num_hidden_layers"],
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
            norm_eps=fields["rms_norm_eps"],
            max_positions=fields["max_position_embeddings"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        )
    except KeyError as missing:
        raise UserError(f"{where}: {missing.args[0]}: the field is missing; is this a complete checkpoint?") from None


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
    return fields


def to_ours(tensor: np.ndarray, transposed: bool) -> np.ndarray:
    """A torch-layout tensor in the decoder's layout, and the other way round."""
    return np.ascontiguousarray(tensor.T) if transposed else tensor
