"""Exported adapters, loaded by PEFT on the checkpoint that training started from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.exported_models import (
    FAMILIES,
    adapted,
    run_snippet,
    snippets,
    torch_vectors,
    write_full_vocabulary,
    write_run,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r3_jax.commands.models import Export
from search_r3_jax.config import LoraConfig, RunConfig
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model
from search_r3_jax.hub.peft import export_peft
from search_r3_jax.models.decoder import positions_from_lengths
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.text.prompts import Prompter

TEXTS = ["how to sort a list by key", "naïve café: 3.14 × 2", "word " * 200]
LORAS = {
    "llama": LoraConfig(rank=4, alpha=12.0, dropout=0.1),
    "qwen2": LoraConfig(rank=2, alpha=1.0, targets=("q", "down")),
    "qwen3": LoraConfig(rank=3, alpha=6.0, targets=("k", "o", "gate")),
}
MAX_TOKENS = 40


def with_peft(base: Path, adapters: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters).eval()


def assert_same(model: LoadedModel, theirs: Any) -> None:
    """The same embeddings, and the same logits, in which the embed token's row stands as well."""
    prompter = Prompter(model.tokenizer)
    ours = Embedder(model, max_tokens=MAX_TOKENS).encode(TEXTS)
    np.testing.assert_allclose(
        ours, torch_vectors(theirs.get_base_model().model, prompter, TEXTS, MAX_TOKENS), atol=1e-5
    )
    ids = np.array([[*prompter.direct.prefix, *prompter.direct_rows(["a text"], 32)[0]]])
    hidden, _ = model.decoder(
        jnp.asarray(ids), positions_from_lengths(jnp.array([ids.shape[1]]), ids.shape[1])
    )
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    # The base may have fewer padding rows behind the embed token; nothing reads them.
    np.testing.assert_allclose(
        np.asarray(model.decoder.logits(hidden))[..., : model.embed_id + 1],
        logits[..., : model.embed_id + 1],
        atol=1e-4,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_adapters_load_on_the_original_checkpoint(
    family: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = adapted(load_model(tiny_folders[family]), LORAS[family])
    folder = export_peft(model, tmp_path / "out", base=str(tiny_folders[family]))
    theirs = with_peft(tiny_folders[family], folder)
    assert_same(model, theirs)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (
        LORAS[family].rank,
        LORAS[family].alpha,
        LORAS[family].dropout,
    )
    assert not config.use_rslora
    assert config.base_model_name_or_path == str(tiny_folders[family])
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cards_snippet_grows_a_vocabulary_that_ends_too_early(family: str, tmp_path: Path) -> None:
    base = write_full_vocabulary(tmp_path / "base", family)
    model = adapted(load_model(base), LORAS[family])
    (snippet,) = snippets(export_peft(model, tmp_path / "out", base=str(base)))
    scope = run_snippet(snippet)
    assert_same(model, scope["model"])
    np.testing.assert_allclose(scope["embed"](TEXTS[0]).numpy(), Embedder(model).encode(TEXTS[0]), atol=1e-5)


@pytest.mark.slow
def test_adapters_of_two_stages_load_on_the_first_base(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_folders["qwen2"]
    config = RunConfig(
        model=str(base), compute_dtype="float32", lora=LoraConfig(rank=2, alpha=6.0, targets=("q", "v", "up"))
    )
    first = adapted(load_model(base), config.lora, seed=1)
    write_run(tmp_path / "sft", config, first, {})
    later = dataclasses.replace(config, lora=LoraConfig(rank=3, alpha=1.5, targets=("q", "down")))
    second = adapted(dataclasses.replace(first, decoder=merge_lora(first.decoder)), later.lora, seed=2)
    run = write_run(tmp_path / "rl", later, second, {"start": "../sft"})

    Export(run_folder=run, out=tmp_path / "out", peft=True).run()
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(base)
    assert record["r"] == record["lora_alpha"] == 5
    assert sorted(record["target_modules"]) == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert_same(second, with_peft(base, tmp_path / "out"))

    Export(run_folder=run, out=tmp_path / "merged").run()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompter = Prompter(second.tokenizer)
    ours = Embedder(second, max_tokens=MAX_TOKENS).encode(TEXTS)
    np.testing.assert_allclose(torch_vectors(merged.model, prompter, TEXTS, MAX_TOKENS), ours, atol=1e-5)


def test_what_has_no_adapters_is_one_line(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_folders["llama"]
    model = load_model(base)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has no adapters"):
        export_peft(model, out, base=str(base))
    with pytest.raises(UserError, match="is no run"):
        Export(model=str(base), out=out, peft=True).run()
    full = write_run(tmp_path / "full", RunConfig(model=str(base), lora=LoraConfig(rank=0)), model, {})
    with pytest.raises(UserError, match="rank: 0"):
        Export(run_folder=full, out=out, peft=True).run()
    assert not out.exists()
