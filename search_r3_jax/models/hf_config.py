"""Reads a `config.json` as `transformers` does: each field is read, fixed, without influence, or refused."""

from __future__ import annotations

from typing import Any

from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError
from search_r3_jax.models.config_values import MISSING, count, number, switch
from search_r3_jax.models.families import ARCHITECTURES
from search_r3_jax.models.rope_fields import ROPE_FIELDS, read_rope

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
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "pad_token_id",
} | ROPE_FIELDS
# Fields without influence on a forward pass, in groups by the reason.
_INERT = {
    # Where a checkpoint is from, and what wrote it. Code that `auto_map` names is never run.
    *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "is_llama_config"),
    *("transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
    # How another program computes and stores the same numbers.
    *("dtype", "torch_dtype", "use_cache", "chunk_size_feed_forward", "pretraining_tp", "torchscript"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "use_bfloat16"),
    "gradient_checkpointing",
    # The shape of its output.
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
    *("keys_to_ignore_at_inference", "tie_last_hidden_states"),
    # Training and initial values; training here has no dropout but that of the adapters.
    *("initializer_range", "attention_dropout", "tf_legacy_loss"),
    # Heads of other tasks.
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    "classifier_dropout",
    # The tokenizer has files of its own.
    *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
    *("tokenizer_class", "model_max_length"),
    # Encoders and decoders of other families.
    *("is_decoder", "tie_encoder_decoder"),
    # Generation: `transformers` drops these from a model's config.
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
}
# Fields with a meaning of which this decoder supports some values only; the first one is the default.
_FIXED: dict[str, tuple[Any, ...]] = {
    # `swish` is another name of the same function.
    "hidden_act": ("silu", "swish"),
    # Not null: `transformers` takes null for false in some of its attention kernels.
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
    # Not of `transformers`: weights of another rotary layout than the one that it and this decoder read.
    "rope_interleaved": (False, None),
}
_FIXED_OF_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": (False,), "mlp_bias": (False,)},
    "qwen2": {},
    "qwen3": {"attention_bias": (False,)},
}
# Fields of other families, which the classes of this one never look at.
_INERT_OF_FAMILY = {
    "llama": {"max_window_layers"},
    "qwen2": {"attention_bias", "mlp_bias"},
    "qwen3": {"mlp_bias"},
}


def config_from_hf(fields: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a `config.json`; raises UserError naming an unsupported field."""
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type: {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    _check_fields(fields, family, where)
    try:
        heads, layers = (
            count(fields, "num_attention_heads", where),
            count(fields, "num_hidden_layers", where),
        )
        hidden = count(fields, "hidden_size", where)
        theta, scaling = read_rope(fields, where)
        window, windowed = _window(fields, layers, where)
        config = ModelConfig(
            family=family,
            vocab_size=count(fields, "vocab_size", where),
            hidden_size=hidden,
            feed_forward=count(fields, "intermediate_size", where),
            layers=layers,
            heads=heads,
            kv_heads=_kv_heads(fields, family, heads, where),
            head_dim=_head_dim(fields, family, hidden, heads, where),
            rope_theta=theta,
            norm_eps=number(fields, "rms_norm_eps", where),
            max_positions=count(fields, "max_position_embeddings", where),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=switch(fields, "tie_word_embeddings", where, False),
            rope_scaling=scaling,
            sliding_window=window,
            windowed=windowed,
        )
    except KeyError as missing:
        raise UserError(
            f"{where}: {missing.args[0]}: the field is missing; is this a complete checkpoint?"
        ) from None
    _check_pad(fields, config.vocab_size, where)
    return config


def _check_fields(fields: dict[str, Any], family: str, where: str) -> None:
    """Refuse a field whose value this decoder does not support, and one that is not known."""
    fixed = _FIXED | _FIXED_OF_FAMILY[family]
    for name, value in fields.items():
        if name in fixed:
            # `0 == False`, but only one of them is a switch.
            if not any(value == only and type(value) is type(only) for only in fixed[name]):
                raise UserError(f"{where}: {name}: {value!r} is not supported; only {fixed[name][0]!r} is")
        elif name not in _READ | _INERT | _INERT_OF_FAMILY[family] and value is not None:
            raise UserError(
                f"{where}: {name}: this field is not known here; if {value!r} changes nothing, remove it"
            )


def _kv_heads(fields: dict[str, Any], family: str, heads: int, where: str) -> int:
    """One a query head where nothing is said, but the class of Qwen has a number of its own."""
    name = "num_key_value_heads"
    if family != "llama" and name not in fields:
        kv_heads = 32
    else:
        kv_heads = heads if fields.get(name) is None else count(fields, name, where)
    if heads % kv_heads:
        raise UserError(
            f"{where}: {name}: {kv_heads} does not divide the {heads} heads; is this the right file?"
        )
    return kv_heads


def _head_dim(fields: dict[str, Any], family: str, hidden: int, heads: int, where: str) -> int:
    if family == "llama" and hidden % heads:
        raise UserError(
            f"{where}: hidden_size: {hidden} is no multiple of the {heads} heads, which transformers "
            "demands of a Llama; is this the right file?"
        )
    if family == "llama" and fields.get("head_dim", MISSING) is None:
        return hidden // heads
    return count(fields, "head_dim", where, 128 if family == "qwen3" else hidden // heads)


def _check_pad(fields: dict[str, Any], rows: int, where: str) -> None:
    pad = fields.get("pad_token_id")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -rows <= pad < rows):
        raise UserError(
            f"{where}: pad_token_id: {pad!r} is no id of the {rows} rows of the embedding table, so "
            "transformers does not open the model; is this the right file?"
        )


def _window(fields: dict[str, Any], layers: int, where: str) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers have it; Qwen turns it on by `use_sliding_window`, from layer
    `max_window_layers`."""
    kinds = _layer_kinds(fields, layers, where)
    on = switch(fields, "use_sliding_window", where, False)
    window = (
        None if fields.get("sliding_window", 4096) is None else count(fields, "sliding_window", where, 4096)
    )
    first = fields.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"{where}: max_window_layers: {first!r} is no whole number; download it again")
    if fields["model_type"] == "llama":
        # Its mask ignores a window, but the cache of `transformers` drops what is beyond one.
        for name, default in (("use_sliding_window", False), ("sliding_window", None)):
            if fields.get(name, default) != default:
                raise UserError(
                    f"{where}: {name}: {fields[name]!r} is not supported: the Llama family has no sliding "
                    "window; remove the field"
                )
    if not on or window is None:
        if kinds is not None and "sliding_attention" in kinds:
            raise UserError(
                f"{where}: layer_types: names sliding_attention but use_sliding_window or sliding_window is "
                "not set; set it, or change the types"
            )
        return 0, ()
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if any(windowed) else (0, ())


def _layer_kinds(fields: dict[str, Any], layers: int, where: str) -> list[str] | None:
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    # `attention` is an older name.
    kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"{where}: layer_types: {unknown[0]!r} is not supported; full_attention and sliding_attention are"
        )
    if len(kinds) != layers:
        raise UserError(
            f"{where}: layer_types: has {len(kinds)} entries for {layers} layers; download the file again"
        )
    return kinds
