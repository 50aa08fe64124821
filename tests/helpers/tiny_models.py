"""Tiny checkpoints and collections for tests: made by torch `transformers` from seeds, with a byte-level
tokenizer."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from search_r3_jax.config import EMBED_TOKEN, ModelConfig
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.models.decoder import Decoder, positions_from_lengths

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}

CONFIG = ModelConfig(
    family="llama",
    vocab_size=320,
    hidden_size=48,
    feed_forward=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=512,
)
"""For decoders that need no checkpoint."""


def byte_tokenizer(*, embed_token: bool = False) -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens, 259 ids, then perhaps `<|embed_token|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, EMBED_TOKEN] if embed_token else SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


FAMILIES = ("llama", "qwen2", "qwen3")
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 32}),
}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
# Scaled so that positions of a few dozen already lie beyond the original length.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama, free head": ("llama", {"tie_word_embeddings": False}),
    "llama, own head size": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama, no shared heads": ("llama", {"num_key_value_heads": 4}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", **_LLAMA3}}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            }
        },
    ),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2, window everywhere": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3, free head, yarn": (
        "qwen3",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 1e6,
            },
        },
    ),
}
"""Every way in which a supported checkpoint can differ: family, and what its config says apart from the
sizes."""


def torch_model(variant: str, *, vocab_size: int = 320, seed: int = 0) -> Any:
    """A random model, one of `VARIANTS`, whose logits are of order 1."""
    torch.manual_seed(seed)
    family, asked = VARIANTS[variant]
    config_class, model_class, own = _CLASSES[family]
    fields = SIZES | own | asked
    config = config_class(
        vocab_size=vocab_size, initializer_range=0.08, eos_token_id=2, bos_token_id=1, **fields
    )
    model = model_class(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start at one and zero, where a mistake in them would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_tiny_checkpoint(folder: Path, variant: str, *, seed: int = 0) -> Path:
    """Save a tiny model and its tokenizer, which knows `<|embed_token|>`: no row changes when it is read.
    Returns the folder."""
    torch_model(variant, seed=seed).save_pretrained(folder)
    byte_tokenizer(embed_token=True).save_pretrained(folder)
    return folder


def plain_hidden(decoder: Decoder, rows: Sequence[Sequence[int]]) -> jax.Array:
    """Final hidden states [N,T,D] of whole rows, right-padded: no shared prefix, no packing, no cache."""
    T = -(-max(len(row) for row in rows) // 64) * 64
    ids = np.zeros((len(rows), T), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    graph, state = nnx.split(decoder)
    return _plain_hidden(graph, state, ids, np.array([len(row) for row in rows], np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _plain_hidden(
    graph: nnx.GraphDef[Decoder], state: nnx.State, ids: jax.Array, lengths: jax.Array
) -> jax.Array:
    return nnx.merge(graph, state)(ids, positions_from_lengths(lengths, ids.shape[1]))[0]


def word_collection(*, documents: int, queries: int, seed: int = 0, split: str = "train") -> Collection:
    """Made-up documents of made-up words; a query repeats two words of its document."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, 4)) for _ in range(200)]
    bodies = [" ".join(generator.choice(words, 6)) for _ in range(documents)]
    made = tuple(Document(doc_id=f"d{i}", title="", text=body) for i, body in enumerate(bodies))
    asked = tuple(
        Query(query_id=f"q{i}", text=" ".join(bodies[i].split()[:2]), positives={f"d{i}": 1})
        for i in range(queries)
    )
    return Collection(name="words", split=split, documents=made, queries=asked)
