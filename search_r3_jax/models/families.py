"""Names of tensors and config fields in each model family, as `transformers` has them."""

from __future__ import annotations

import math
from typing import Any, Literal

from search_r3_jax.config import ModelConfig, RopeScaling
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

# Fields that `config_from_hf` reads.
_READ = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
}
# Fields without influence on a forward pass: bookkeeping, initial values, generation, output format.
_INERT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_version",
    "use_cache",
}
# Fields of which this decoder supports only one value.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
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
    """The `ModelConfig` of a `config.json`; raises UserError naming an unsupported field."""
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type: {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    for name, value in fields.items():
        if name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise UserError(f"{where}: {name}: {value!r} is not supported; only {_FIXED[name]!r} is")
        elif name not in _READ | _INERT and value:
            raise UserError(
                f"{where}: {name}: this field is not known here; if {value!r} changes nothing, remove it"
            )
    try:
        heads, layers = (
            _count(fields, "num_attention_heads", where),
            _count(fields, "num_hidden_layers", where),
        )
        hidden = _count(fields, "hidden_size", where)
        theta, scaling = _rope(fields, where)
        window, windowed = _window(fields, layers, where)
        config = ModelConfig(
            family=family,
            vocab_size=_count(fields, "vocab_size", where),
            hidden_size=hidden,
            feed_forward=_count(fields, "intermediate_size", where),
            layers=layers,
            heads=heads,
            kv_heads=_count(fields, "num_key_value_heads", where, heads),
            head_dim=_count(fields, "head_dim", where, 128 if family == "qwen3" else hidden // heads),
            rope_theta=theta,
            norm_eps=_number(fields, "rms_norm_eps", where),
            max_positions=_count(fields, "max_position_embeddings", where),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            sliding_window=window,
            windowed=windowed,
        )
    except KeyError as missing:
        raise UserError(
            f"{where}: {missing.args[0]}: the field is missing; is this a complete checkpoint?"
        ) from None
    if config.heads % config.kv_heads:
        raise UserError(
            f"{where}: num_key_value_heads: {config.kv_heads} does not divide the {config.heads} heads; is "
            "this the right file?"
        )
    return config


def _count(fields: dict[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = fields[name] if default is None else fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {name}: {value!r} is no positive whole number; download the file again")
    return value


def _number(fields: dict[str, Any], name: str, where: str, default: float | None = None) -> float:
    value = fields[name] if default is None else fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name}: {value!r} is no positive number; download the file again")
    return float(value)


def _rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """θ and the scaling; older files say `rope_theta` and `rope_scaling`, newer ones `rope_parameters`."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: rope_parameters: {given!r} is no JSON object; download the file again")
    place = f"{where}: rope_parameters"
    theta = _number(given, "rope_theta", place, _number(fields, "rope_theta", where, 10_000.0))
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"{place}.partial_rotary_factor: {given['partial_rotary_factor']!r} is not supported; only 1.0 is"
        )
    kind = given.get("rope_type") or given.get("type") or "default"
    named = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    fields_of = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            *("factor", "original_max_position_embeddings", "attention_factor"),
            *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        },
    }
    if kind not in fields_of:
        raise UserError(f"{place}.rope_type: {kind!r} is not supported; use one of {', '.join(fields_of)}")
    unknown = sorted(
        name for name, value in given.items() if name not in named | fields_of[kind] and value is not None
    )
    if unknown:
        raise UserError(
            f"{place}.{unknown[0]}: not known for rope_type {kind!r}; if it changes nothing, remove it"
        )
    if kind == "default":
        return theta, None
    factor = _number(given, "factor", place)
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    inside = given | {
        key: fields[key] for key in ("original_max_position_embeddings",) if fields.get(key) is not None
    }
    original = _count(
        inside, "original_max_position_embeddings", place, _count(fields, "max_position_embeddings", where)
    )
    if kind == "llama3":
        low, high = _number(given, "low_freq_factor", place), _number(given, "high_freq_factor", place)
        if low >= high:
            raise UserError(f"{place}.high_freq_factor: {high} must be greater than low_freq_factor, {low}")
        return theta, RopeScaling(
            kind="llama3", factor=factor, original_positions=original, low_frequency=low, high_frequency=high
        )
    return theta, RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=_number(given, "beta_fast", place, 32.0),
        beta_slow=_number(given, "beta_slow", place, 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_yarn_attention_factor(given, factor, place),
    )


def _yarn_attention_factor(given: dict[str, Any], factor: float, place: str) -> float:
    """√(1/t) of YaRN (arXiv 2309.00071, equation 15), as given, or in DeepSeek's form with two weights."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor", place)
    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(_number(given, "mscale", place)) / grown(_number(given, "mscale_all_dim", place))
    return grown(1.0)


def _window(fields: dict[str, Any], layers: int, where: str) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers have it; Qwen turns it on by `use_sliding_window`, from layer
    `max_window_layers`."""
    kinds = fields.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise UserError(
                f"{where}: layer_types: {unknown[0]!r} is not supported; full_attention and "
                "sliding_attention are"
            )
        if len(kinds) != layers:
            raise UserError(
                f"{where}: layer_types: has {len(kinds)} entries for {layers} layers; download the file again"
            )
    if not fields.get("use_sliding_window"):
        if kinds is not None and "sliding_attention" in kinds:
            raise UserError(
                f"{where}: layer_types: names sliding_attention but use_sliding_window is not set; set it, "
                "or change the types"
            )
        # Llama has no such switch; its reference implementation ignores a window.
        return 0, ()
    if fields["model_type"] == "llama":
        raise UserError(
            f"{where}: use_sliding_window: the Llama family has no sliding window; remove the field"
        )
    if fields.get("sliding_window") is None:
        return 0, ()
    window = _count(fields, "sliding_window", where)
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if any(windowed) else (0, ())


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
