"""Models for plans: architecture, shapes of parameters, and a tokenizer of realistic prompt lengths."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN, ModelConfig, RunConfig
from search_r3_jax.hub.load_model import model_config
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM, Prompter

_QWEN25 = ModelConfig(
    family="qwen2",
    vocab_size=151_936,
    hidden_size=1536,
    feed_forward=8960,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=32_768,
    qkv_bias=True,
)
# From the published config.json files, so that plans need no download.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        family="llama",
        vocab_size=49_152,
        hidden_size=576,
        feed_forward=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        max_positions=8192,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN25,
    "Qwen/Qwen2.5-7B-Instruct": dataclasses.replace(
        _QWEN25,
        vocab_size=152_064,
        hidden_size=3584,
        feed_forward=18_944,
        heads=28,
        kv_heads=4,
        tied_embeddings=False,
    ),
    "Qwen/Qwen3-8B": ModelConfig(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=4096,
        feed_forward=12_288,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_positions=40_960,
        qk_norm=True,
        tied_embeddings=False,
    ),
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class PlannedModel(NamedTuple):
    """A decoder of shapes without arrays, and prompts of about as many tokens as the real ones."""

    decoder: Decoder
    prompter: Prompter


def planned_model(config: RunConfig, *, adapters: bool = True) -> PlannedModel:
    """The model of a config with or without adapters.

    Raises UserError when its architecture cannot be determined.
    """
    architecture = PUBLISHED.get(config.model) or model_config(config.model)
    prompter = Prompter(stand_in_tokenizer())

    def make() -> Decoder:
        return Decoder(
            architecture,
            rngs=nnx.Rngs(0),
            lora=config.lora if config.lora.rank and adapters else None,
            embed_id=prompter.embed_id,
            compute_dtype=jnp.dtype(config.compute_dtype),
            remat=config.remat,
            attention=config.attention,
        )

    return PlannedModel(nnx.eval_shape(make), prompter)


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word: plans need the length of prompts, not their content."""
    words = Tokenizer(models.WordLevel(vocab={}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n| ?[^\w\s]"), "isolated")
    text = "\n".join(
        (DIRECT_SYSTEM, REASON_SYSTEM, CLOSING, "system", "user", "assistant", " text", ".", "|")
    )
    pieces = sorted({piece for piece, _ in words.pre_tokenizer.pre_tokenize_str(text)})
    words.model = models.WordLevel(
        vocab={piece: i for i, piece in enumerate(["<unk>", *pieces])}, unk_token="<unk>"
    )
    special = ["<|im_start|>", "<|im_end|>", EMBED_TOKEN]
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
