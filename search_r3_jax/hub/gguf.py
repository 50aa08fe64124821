"""Reads a GGUF file: config, weights in the names and layout of `transformers`, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError

_FAMILIES: dict[str, Literal["llama", "qwen2", "qwen3"]] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_GLOBAL = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONTROL, _USER_DEFINED = 3, 4


class GgufFile:
    """One open GGUF file; raises UserError when it is not one or its architecture is not supported."""

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"{path}: reading GGUF needs one more package: pip install 'search_r3_jax[quickstart]'") from None
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a GGUF file, a Hugging Face folder or a run directory")
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, OSError, KeyError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from None
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = str(self._field("general.architecture"))
        if architecture not in _FAMILIES:
            supported = ", ".join(_FAMILIES)
            raise UserError(f"{path}: general.architecture: {architecture!r} is not supported; use one of {supported}")
        self._architecture = architecture
        self.config = self._read_config()

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise UserError(f"{self._path}: {key}: the field is missing; the file is not a complete model")
            return default
        return field.contents()

    def _read_config(self) -> ModelConfig:
        def number(key: str, default: Any = None) -> Any:
            return self._field(f"{self._architecture}.{key}", default)

        if self._field(f"{self._architecture}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self._tensors:
            raise UserError(f"{self._path}: rope.scaling: scaled rotary positions are not supported in GGUF files")
        hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
        return ModelConfig(
            family=_FAMILIES[self._architecture],
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            feed_forward=int(number("feed_forward_length")),
            layers=int(number("block_count")),
            heads=heads,
            kv_heads=int(number("attention.head_count_kv", heads)),
            head_dim=int(number("attention.key_length", hidden // heads)),
            rope_theta=float(number("rope.freq_base", 10_000.0)),
            norm_eps=float(np.float32(number("attention.layer_norm_rms_epsilon"))),
            max_positions=int(number("context_length")),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            tied_embeddings="output.weight" not in self._tensors,
        )

    def tensor_reader(self) -> Callable[[str], np.ndarray]:
        """A function from a `transformers` tensor name to that tensor, float32, torch layout."""
        from gguf.quants import dequantize

        def read(name: str) -> np.ndarray:
            gguf_name = _gguf_name(name)
            if gguf_name not in self._tensors:
                raise KeyError(name)
            tensor = self._tensors[gguf_name]
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            array = array.reshape([int(size) for size in reversed(tensor.shape)])
            if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = self.config.heads if "q_proj" in name else self.config.kv_heads
                array = _undo_rope_permutation(array, heads)
            return array

        return read

    def tokenizer_fields(self) -> dict[str, Any]:
        """Tokens, merges, special ids, chat template and pre-tokenizer name."""
        model = self._field("tokenizer.ggml.model")
        if model != "gpt2":
            raise UserError(f"{self._path}: tokenizer.ggml.model: {model!r} is not supported; only byte-level BPE ('gpt2') is")
        kinds = self._field("tokenizer.ggml.token_type")
        return {
            "tokens": self._field("tokenizer.ggml.tokens"),
            "special": [i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)],
            "merges": self._field("tokenizer.ggml.merges"),
            "pre": self._field("tokenizer.ggml.pre", "default"),
            "bos": int(self._field("tokenizer.ggml.bos_token_id", -1)),
            "eos": int(self._field("tokenizer.ggml.eos_token_id")),
            "pad": int(self._field("tokenizer.ggml.padding_token_id", -1)),
            "chat_template": self._field("tokenizer.chat_template", ""),
        }


def _gguf_name(name: str) -> str:
    if name in _GLOBAL:
        return f"{_GLOBAL[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def _undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two rotary halves of each head's rows; `transformers` keeps them apart."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
