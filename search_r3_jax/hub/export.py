"""Writes a decoder as a Hugging Face folder, at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel, torch_tensors
from search_r3_jax.models.families import config_to_hf
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM

SHARD_BYTES = 4 << 30


def export_model(model: LoadedModel, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> Path:
    """Merged weights, config, tokenizer with `<|embed_token|>`, prompts and a model card; an interrupted export leaves nothing.

    Raises UserError when `out` exists and is no earlier export.
    """
    if out.exists() and not (out / "search_r3.json").is_file():
        raise UserError(f"{out}: exists and is no export of ours; choose another --out")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(model, temporary, dtype)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(model: LoadedModel, folder: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    decoder = merge_lora(model.decoder)
    tokenizer = model.tokenizer
    config = config_to_hf(decoder.config, dtype)
    config |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _json(folder / "config.json", config)
    # Generation ends at the embedding as well as at the end of the turn.
    ends = [tokenizer.eos_token_id, model.embed_id]
    _json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id})
    tokenizer.save_pretrained(str(folder))
    _json(
        folder / "search_r3.json",
        {
            "embed_token": EMBED_TOKEN,
            "embed_token_id": model.embed_id,
            "pooling": "state after the final norm at the embed token, L2-normalised in float32",
            "direct_system": DIRECT_SYSTEM,
            "reason_system": REASON_SYSTEM,
            "closing": CLOSING,
        },
    )
    _write_shards(torch_tensors(decoder), folder, dtype)
    (folder / "README.md").write_text(_model_card(), encoding="utf-8")


def _write_shards(tensors: Iterable[tuple[str, np.ndarray]], folder: Path, dtype: str) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors:
        stored = np.ascontiguousarray(tensor.astype(bfloat16 if dtype == "bfloat16" else np.float32))
        if size and size + stored.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
    if len(shards) == 1:
        save_file(shards[0], str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _model_card() -> str:
    return f"""---
library_name: transformers
pipeline_tag: sentence-similarity
---

# A search embedder that thinks first

The embedding of a text is the final hidden state at `{EMBED_TOKEN}`, normalised to length 1; similarity is the cosine.

- direct: system `{DIRECT_SYSTEM}`, user: the text, assistant: `{CLOSING}`
- reasoned: system `{REASON_SYSTEM}`, user: the query, assistant: the model writes, and ends with `{CLOSING}`

Documents are embedded directly, queries either way.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)


def embed(text):
    messages = [{{"role": "system", "content": "{DIRECT_SYSTEM}"}}, {{"role": "user", "content": text.strip()}}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "{CLOSING}"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        state = model.model(**inputs).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state.float(), dim=0)


print(embed("sort a list by key") @ embed("def by_key(rows, key): return sorted(rows, key=key)"))
```
"""
