"""What the tests of exports share: texts, snippets of a card, and torch's view of an embedding."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from helpers.tiny_models import byte_tokenizer, torch_model

from search_r3_jax.config import LoraConfig, RunConfig
from search_r3_jax.files import write_json
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import LoadedModel, with_lora
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.text.prompts import Prompter

TEXTS = [
    "how to sort a list by key",
    "",
    "def add(a, b):\n    return a + b",
    "  naïve café: 3.14 × 2 = 6.28?  ",
    "word " * 200,
    "x",
]
FAMILIES = ("llama", "qwen2", "qwen3")


def write_full_vocabulary(folder: Path, family: str) -> Path:
    """A checkpoint whose vocabulary ends with the tokenizer's last id, so that the embed token needs a new
    row."""
    tokenizer = byte_tokenizer()
    torch_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(model: LoadedModel, lora: LoraConfig, *, seed: int = 0) -> LoadedModel:
    """Adapters and rows that are far from where training starts."""
    result = with_lora(model, lora, seed=seed)
    generator = np.random.default_rng(seed)
    for target in lora.targets:
        b = getattr(result.decoder.layers, target).lora_b
        b.set_value(jnp.asarray(0.1 * generator.standard_normal(b.shape), jnp.float32))
    for row in (result.decoder.embed_row, result.decoder.head_row):
        if row is not None:
            row.set_value(jnp.asarray(generator.standard_normal(row.shape), jnp.float32))
    return result


def write_run(folder: Path, config: RunConfig, model: LoadedModel, extra: dict[str, Any]) -> Path:
    """The files of a run that `load_model` and `load_stages` read, with `model`'s adapters as step 3."""
    folder.mkdir()
    write_json(folder / "config.json", {"stage": "sft", "config": dataclasses.asdict(config), **extra})
    writer = CheckpointWriter(folder)
    writer.save(3, nnx.state(model.decoder, trainable_filter(model.decoder)), {"count": np.zeros(())}, {})
    writer.close()
    return folder


def snippets(folder: Path) -> list[str]:
    """The Python blocks of a card, with the folder filled in."""
    blocks = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    return [block.split("```")[0].replace('folder = "."', f"folder = {str(folder)!r}") for block in blocks]


def run_snippet(code: str) -> dict[str, Any]:
    """The names that a snippet leaves behind."""
    scope: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), scope)
    return scope


def torch_vectors(decoder: Any, prompter: Prompter, texts: Sequence[str], max_tokens: int) -> np.ndarray:
    """Unit vectors [N,E] of a torch decoder without its head, one text at a time, normalised in float64."""
    states = []
    for row in prompter.direct_rows(texts, max_tokens):
        with torch.no_grad():
            states.append(
                decoder(input_ids=torch.tensor([[*prompter.direct.prefix, *row]]))
                .last_hidden_state[0, -1]
                .double()
                .numpy()
            )
    stacked = np.stack(states)
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)
