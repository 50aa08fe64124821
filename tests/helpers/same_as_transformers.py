"""Folders of tiny models in every layout, and their embeddings here and in torch `transformers`."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from helpers.tiny_models import CHAT_TEMPLATE, byte_tokenizer
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.embedder import Embedder
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TEXTS = ("where is the key?", "def f(x):\n    return x + 1")
ROWS = 320
TOLERANCE = 1e-5
Tensors = dict[str, torch.Tensor]


def base_fields(family: str) -> dict[str, Any]:
    """The least that a `config.json` has to say, for a model of two layers."""
    return {
        "model_type": family,
        "vocab_size": ROWS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


@functools.lru_cache(maxsize=64)
def _state(family: str, sizes: tuple[tuple[str, Any], ...], seed: int) -> Tensors:
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(initializer_range=0.2, **dict(sizes)))
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for tensor in tensors.values():
        # Norms and biases start at one and zero, where a mistake in them would not show.
        if tensor.ndim == 1:
            tensor.add_(0.2 * torch.randn(tensor.shape))
    if dict(sizes)["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return tensors


def random_tensors(fields: dict[str, Any], *, seed: int = 0) -> Tensors:
    """Weights of the sizes in `fields`, under the names of a causal language model."""
    sizes = {
        name: value for name, value in fields.items() if name in base_fields("") and name != "model_type"
    }
    return dict(_state(fields["model_type"], tuple(sorted(sizes.items())), seed))


def write_config(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def write_tensors(
    folder: Path, tensors: Tensors, *, shards: int = 1, dtype: torch.dtype | None = None
) -> None:
    """One file, or several with their index."""
    stored = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(stored)
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        part = {name: stored[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def without_prefix(tensors: Tensors) -> Tensors:
    """As `AutoModel.save_pretrained` writes them: the decoder alone."""
    return {
        name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
    }


def metaspace_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """In the style of SentencePiece, bytes for other characters; `kind` says where it puts a `▁` before."""
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "e", "t", "h", "▁t", "he", "▁the", "k", "y", "▁k"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "k")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", EMBED_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"
    )


def write_tokenizer(folder: Path, *, kind: str = "bytes", begin: bool = False) -> None:
    """Save a tokenizer that has `<|embed_token|>`; `begin` puts its first token before every chat."""
    tokenizer = byte_tokenizer(embed_token=True) if kind == "bytes" else metaspace_tokenizer(kind)
    if begin and tokenizer.bos_token is None:
        tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = ("{{ bos_token }}" if begin else "") + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def torch_rows(folder: Path) -> list[list[int]]:
    """Token ids of whole chats up to the embed token, as `transformers` writes and reads them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        messages = [{"role": "system", "content": DIRECT_SYSTEM}, {"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(chat + CLOSING, add_special_tokens=False)["input_ids"])
    return rows


def torch_embeddings(folder: Path, rows: list[list[int]] | None = None) -> np.ndarray:
    """Unit vectors [N,E] of torch `transformers`: the last state of each row, by default of `torch_rows`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states = []
    with torch.no_grad():
        for ids in rows or torch_rows(folder):
            output = model.model(input_ids=torch.tensor([ids]), return_dict=True)
            states.append(output.last_hidden_state[0, -1].numpy())
    stacked = np.stack(states)
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)


def our_embeddings(folder: Path) -> np.ndarray:
    """Unit vectors [N,E] of `Embedder`; nothing is compiled, for each folder would need its own program."""
    with jax.disable_jit():
        return Embedder.load(folder).encode(TEXTS, kind="document")
