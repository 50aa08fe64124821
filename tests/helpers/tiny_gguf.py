"""Tiny GGUF files for tests, written with the `gguf` package from torch models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from helpers.tiny_models import CHAT_TEMPLATE, SPECIAL
from tokenizers import pre_tokenizers

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, own = module.split(".", 3)
        return f"blk.{layer}.{NAMES[own]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def rope_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores a Llama's q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_tokenizer(
    writer: GGUFWriter,
    *,
    tokens: Sequence[str],
    merges: Sequence[str],
    kinds: Sequence[int],
    pre: str = "default",
    eos: int | None = 2,
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    # The writer drops empty lists: the pair is not in any text.
    writer.add_token_merges(list(merges))
    if eos is not None:
        writer.add_eos_token_id(eos)


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: str = "F32",
    extra: Callable[[GGUFWriter], None] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pre: str = "default",
    template: str = CHAT_TEMPLATE,
) -> Path:
    """A torch model as a GGUF file whose matrices are stored as `kind`; `extra` adds fields, `tensors` more
    tensors."""
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # A space is spelled Ġ in the byte alphabet; the doubled space gives the list of merges one entry.
    tokens = [*SPECIAL, *BYTES, "ĠĠ"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
    kinds = (
        [3] * len(SPECIAL)
        + [1] * (len(BYTES) + 1)
        + [5] * (config.vocab_size - len(SPECIAL) - len(BYTES) - 1)
    )
    write_tokenizer(writer, tokens=tokens, merges=["Ġ Ġ"], kinds=kinds, pre=pre)
    if template:
        writer.add_chat_template(template)
    if extra is not None:
        extra(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            array = rope_interleaved(
                array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        stored = GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(array, stored), raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
