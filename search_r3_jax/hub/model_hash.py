"""Hash of all that a model's vectors depend on beside the texts and their limits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from flax import nnx
from transformers import PreTrainedTokenizerFast

from search_r3_jax.config import ModelConfig
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.text.prompts import Prompter


def model_hash(params: nnx.State, config: ModelConfig, prompter: Prompter) -> str:
    """Hexadecimal sha256 over parameters, config, tokenizer and prompts."""
    digest = hashlib.sha256(parameter_hash(params).encode())
    tokenizer = prompter.tokenizer
    parts = (
        asdict(config),
        # Equal vocabularies may cut a text differently: merges and normalisation are in the serialised form.
        tokenizer.backend_tokenizer.to_str() if isinstance(tokenizer, PreTrainedTokenizerFast) else "",
        sorted(tokenizer.get_vocab().items()),
        asdict(prompter.direct),
        asdict(prompter.reason),
        prompter.embed_id,
        prompter.end_ids,
    )
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
