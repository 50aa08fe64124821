"""Reads a GGUF file: config, weights in the names and layout of `transformers`, and the tokenizer."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search_r3_jax.config import ModelConfig, RopeScaling
from search_r3_jax.errors import UserError
from search_r3_jax.extras import require
from search_r3_jax.hub.gguf_header import GgufHeader, GgufTensor, read_header

_FAMILIES: dict[str, Literal["llama", "qwen2", "qwen3"]] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_STORED = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
_BLOCK = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<module>\w+)")
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and 3.2.
_LLAMA3_FACTORS = (8.0, 32.0)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Of a text, of a turn, and of a message that awaits a tool's result.
_ENDS = ("eos", "eot", "eom")
_MISSING: Any = object()
# Fields below the architecture's name: those that `GgufFile` reads,
_READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base"),
    *("rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# those without influence (the table says how many rows it has),
_INERT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
# and those that may only say what a decoder is anyway. Others, such as `attention.scale`, are refused.
_FIXED = {("attention.causal", True), ("expert_count", 0), ("expert_used_count", 0)}


class GgufFile:
    """One open GGUF file; raises UserError when it is damaged or holds something that is not supported.

    `config` is the model's; `shapes` its tensors under their `transformers` names, in torch order.
    """

    def __init__(self, path: Path):
        require(str(path), "quickstart", "gguf")
        import gguf

        if not path.is_file():
            raise UserError(
                f"{path}: no such file; give a GGUF file, a Hugging Face folder or a run directory"
            )
        self._path = path
        self._types = {
            gguf.GGMLQuantizationType[name].value: gguf.GGMLQuantizationType[name] for name in _STORED
        }
        self._block_sizes = gguf.GGML_QUANT_SIZES
        self._dequantize = gguf.quants.dequantize
        try:
            # Plain views of the mapped bytes: an array of the memmap class is slow to slice.
            self._bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from None
        self._header: GgufHeader = read_header(path, self._bytes)
        architecture = self._text("general.architecture")
        if architecture not in _FAMILIES:
            supported = ", ".join(_FAMILIES)
            raise UserError(
                f"{path}: general.architecture: {architecture!r} is not supported; use one of {supported}"
            )
        self._architecture = architecture
        for tensor in self._header.tensors.values():
            self._check_storage(tensor)
        self._check_fields()
        self.config = self._read_config()
        self._stored = {
            _hf_name(name): tensor for name, tensor in self._header.tensors.items() if name != _ROPE_FACTORS
        }
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, dequantised to float32; `index` names rows first, as `shapes` does."""
        tensor = self._stored[name]
        if len(tensor.shape) == 1:
            return self._rows(tensor, slice(0, 1))[0][index]
        rows, *columns = index
        chosen: slice | np.ndarray = rows
        if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = self.config.heads if "q_proj" in name else self.config.kv_heads
            chosen = _rope_rows(tensor.shape[0], heads)[rows]
        return self._rows(tensor, chosen)[(slice(None), *columns)]

    def tokenizer_fields(self) -> dict[str, Any]:
        """Tokens, merges, special ids (−1: none), ends of a turn, chat template and pre-tokenizer name."""
        model = self._text("tokenizer.ggml.model")
        if model != "gpt2":
            raise UserError(
                f"{self._path}: tokenizer.ggml.model: {model!r} is not supported; only byte-level BPE "
                "('gpt2') is"
            )
        tokens = self._list("tokenizer.ggml.tokens", str)
        kinds = self._list("tokenizer.ggml.token_type", int, default=[1] * len(tokens))
        if not tokens or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
            raise UserError(
                f"{self._path}: tokenizer.ggml.tokens: empty, doubled or without their types; download the "
                "file again"
            )
        # Unused tokens at the end only pad the embedding matrix; new tokens may take their place.
        used = max((i + 1 for i, kind in enumerate(kinds) if kind != _UNUSED), default=0)
        return {
            "tokens": tokens[:used],
            "special": [i for i, kind in enumerate(kinds) if kind == _CONTROL],
            "whole": [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED],
            "merges": self._list("tokenizer.ggml.merges", str),
            "pre": self._text("tokenizer.ggml.pre", "default"),
            "bos": self._token("bos", used),
            "eos": self._token("eos", used),
            "pad": self._token("padding", used),
            "ends": [end for end in (self._token(name, used) for name in _ENDS) if end >= 0],
            "chat_template": self._text("tokenizer.chat_template", ""),
        }

    def _check_fields(self) -> None:
        """Refuse a field of the architecture that may change what it computes."""
        prefix = f"{self._architecture}."
        for key, value in self._header.fields.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in _READ | _INERT:
                if (key.removeprefix(prefix), value) in _FIXED:
                    continue
                raise UserError(
                    f"{self._path}: {key}: {str(value)[:40]} is not supported; use the Hugging Face folder "
                    "of this model"
                )

    def _read_config(self) -> ModelConfig:
        arch = self._architecture
        tensors = self._header.tensors
        if "token_embd.weight" not in tensors:
            raise UserError(f"{self._path}: token_embd.weight: missing; the file is not a complete model")
        if self._integer(f"{arch}.attention.sliding_window", 0):
            raise UserError(
                f"{self._path}: {arch}.attention.sliding_window: not supported; use the Hugging Face folder "
                "of this model"
            )
        hidden, heads = (
            self._positive(f"{arch}.embedding_length"),
            self._positive(f"{arch}.attention.head_count"),
        )
        head_dim = self._positive(f"{arch}.attention.key_length", max(1, hidden // heads))
        rope_theta = self._number(f"{arch}.rope.freq_base", 10_000.0)
        for key in (f"{arch}.rope.dimension_count", f"{arch}.attention.value_length"):
            if self._positive(key, head_dim) != head_dim:
                raise UserError(
                    f"{self._path}: {key}: differs from the head's {head_dim} dimensions, which is not "
                    "supported"
                )
        return ModelConfig(
            family=_FAMILIES[arch],
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            feed_forward=self._positive(f"{arch}.feed_forward_length"),
            layers=self._positive(f"{arch}.block_count"),
            heads=heads,
            kv_heads=self._positive(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=rope_theta,
            norm_eps=self._number(f"{arch}.attention.layer_norm_rms_epsilon"),
            max_positions=self._positive(f"{arch}.context_length"),
            qkv_bias="blk.0.attn_q.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            tied_embeddings="output.weight" not in tensors,
            rope_scaling=self._rope_scaling(head_dim, rope_theta),
        )

    def _rope_scaling(self, head_dim: int, rope_theta: float) -> RopeScaling | None:
        at = f"{self._architecture}.rope.scaling"
        kind = self._text(f"{at}.type", "none")
        if _ROPE_FACTORS in self._header.tensors:
            if kind != "none":
                raise UserError(
                    f"{self._path}: {at}.type: {kind!r} together with {_ROPE_FACTORS} is not supported"
                )
            return self._llama3_scaling(head_dim, rope_theta)
        if kind == "none":
            return None
        factor = self._number(f"{at}.factor")
        if kind == "linear":
            return RopeScaling(kind="linear", factor=factor)
        if kind == "yarn":
            for key in ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
                if f"{at}.{key}" in self._header.fields:
                    raise UserError(
                        f"{self._path}: {at}.{key}: not supported; use the Hugging Face folder of this model"
                    )
            return RopeScaling(
                kind="yarn",
                factor=factor,
                original_positions=self._positive(f"{at}.original_context_length"),
                beta_fast=self._number(f"{at}.yarn_beta_fast", 32.0),
                beta_slow=self._number(f"{at}.yarn_beta_slow", 1.0),
                # YaRN (arXiv 2309.00071), equation 22.
                attention_factor=self._number(f"{at}.attn_factor", 1.0)
                * (0.1 * math.log(max(factor, 1.0)) + 1.0),
            )
        raise UserError(
            f"{self._path}: {at}.type: {kind!r} is not supported; use the Hugging Face folder of this model"
        )

    def _llama3_scaling(self, head_dim: int, rope_theta: float) -> RopeScaling:
        """Llama 3.1's scaling, which a GGUF file keeps as one divisor a frequency; any other set of divisors
        is an error."""
        tensor = self._header.tensors[_ROPE_FACTORS]
        if tensor.shape == (head_dim // 2,):
            divisors = self._rows(tensor, slice(0, 1))[0]
            for factor in _LLAMA3_FACTORS:
                scaling = RopeScaling(kind="llama3", factor=factor, original_positions=8192)
                if np.allclose(divisors, _llama3_divisors(scaling, head_dim, rope_theta), rtol=1e-4):
                    return scaling
        raise UserError(
            f"{self._path}: {_ROPE_FACTORS}: not Llama 3.1's scaling; use the Hugging Face folder of this "
            "model"
        )

    def _check_storage(self, tensor: GgufTensor) -> None:
        kind = self._types.get(tensor.kind)
        if kind is None:
            raise UserError(
                f"{self._path}: {tensor.name}: storage type {tensor.kind} is not supported; use one of "
                f"{', '.join(_STORED)}"
            )
        block, size = self._block_sizes[kind]
        if tensor.shape[-1] % block:
            raise UserError(
                f"{self._path}: {tensor.name}: rows of {tensor.shape[-1]} are no whole {kind.name} blocks; "
                "download it again"
            )
        end = self._header.data_start + tensor.offset + math.prod(tensor.shape) // block * size
        if end > self._bytes.size:
            raise UserError(
                f"{self._path}: {tensor.name}: ends at byte {end}, the file at {self._bytes.size}; download "
                "it again"
            )

    def _rows(self, tensor: GgufTensor, rows: slice | np.ndarray) -> np.ndarray:
        kind = self._types[tensor.kind]
        block, size = self._block_sizes[kind]
        row_bytes = tensor.shape[-1] // block * size
        start = self._header.data_start + tensor.offset
        stored = self._bytes[start : start + math.prod(tensor.shape[:-1]) * row_bytes].reshape(-1, row_bytes)
        # A copy: the file's bytes need not be aligned.
        return np.asarray(self._dequantize(np.array(stored[rows]), kind), dtype=np.float32)

    def _field(self, key: str, expected: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        value = self._header.fields.get(key, default)
        if value is _MISSING:
            raise UserError(f"{self._path}: {key}: the field is missing; the file is not a complete model")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{self._path}: {key}: not {expected}; download the file again")
        return value

    def _text(self, key: str, default: Any = _MISSING) -> str:
        return self._field(key, "a text", str, default)

    def _integer(self, key: str, default: Any = _MISSING) -> int:
        return self._field(key, "a whole number", int, default)

    def _positive(self, key: str, default: Any = _MISSING) -> int:
        value = self._integer(key, default)
        if value < 1:
            raise UserError(f"{self._path}: {key}: {value} is not positive; download the file again")
        return value

    def _number(self, key: str, default: Any = _MISSING) -> float:
        value = float(self._field(key, "a number", (int, float), default))
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{self._path}: {key}: {value} is not a positive number; download the file again")
        return value

    def _list(self, key: str, kind: type, default: Any = _MISSING) -> list[Any]:
        values = self._field(key, "a list", list, default)
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self._path}: {key}: holds values of another type; download the file again")
        return values

    def _token(self, name: str, count: int) -> int:
        token = self._integer(f"tokenizer.ggml.{name}_token_id", -1)
        if token >= count:
            raise UserError(
                f"{self._path}: tokenizer.ggml.{name}_token_id: {token}, but there are {count} tokens; "
                "download the file again"
            )
        return token


def _hf_name(name: str) -> str:
    """The `transformers` name of a tensor; unknown names stay as they are."""
    module, _, kind = name.rpartition(".")
    if module in _GLOBAL:
        return f"{_GLOBAL[module]}.{kind}"
    match = _BLOCK.fullmatch(module)
    if match and match["module"] in _LAYER:
        return f"model.layers.{match['layer']}.{_LAYER[match['module']]}.{kind}"
    return name


def _rope_rows(rows: int, heads: int) -> np.ndarray:
    """Row order of `transformers`: llama.cpp interleaves the two rotary halves of a head."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _llama3_divisors(scaling: RopeScaling, head_dim: int, rope_theta: float) -> np.ndarray:
    """The divisor of each frequency [H/2]; the blend is that of Llama 3.1's published code."""
    frequencies = rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_positions * frequencies / (2 * np.pi)
    kept = np.clip(
        (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency), 0.0, 1.0
    )
    return 1.0 / (kept + (1.0 - kept) / scaling.factor)
