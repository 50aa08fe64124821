"""Perplexity: torch `transformers` on the same text, one document at a time."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import byte_tokenizer, torch_model, word_collection, write_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.perplexity import measure_perplexity, perplexity, text_rows
from search_r3_jax.hub.load_model import load_model


def torch_perplexity(folder: Path, rows: list[list[int]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nats, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            # The loss that transformers itself computes, shifted by itself.
            nats += float(model(ids, labels=ids).loss) * (len(row) - 1)
        tokens += len(row) - 1
    return math.exp(nats / tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.slow
def test_agrees_with_torch(tiny_folders: dict[str, Path], family: str) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 259, length).tolist() for length in (2, 3, 17, 16, 40, 90, 33, 5)]
    found = perplexity(load_model(tiny_folders[family]).decoder, [*rows, [7], []])
    assert (found.tokens, found.texts) == (sum(len(row) - 1 for row in rows), len(rows))
    assert found.perplexity == pytest.approx(torch_perplexity(tiny_folders[family], rows), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))


def test_texts_begin_as_the_tokenizer_begins_them(tmp_path: Path) -> None:
    plain = byte_tokenizer()
    assert text_rows(plain, ["ab", ""], 8) == [plain("ab", add_special_tokens=False)["input_ids"], []]
    from tokenizers.processors import TemplateProcessing

    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    plain.save_pretrained(tmp_path)
    rows = text_rows(AutoTokenizer.from_pretrained(tmp_path), ["ab", "abcd"], 3)
    assert [row[0] for row in rows] == [1, 1]
    assert [len(row) for row in rows] == [3, 3]


def test_a_text_without_a_second_token_is_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(tiny_model.decoder, [[5], []])


def test_the_record_says_what_was_read(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    made = word_collection(documents=30, queries=5, split="test")
    build_dataset({"test": made}, tmp_path / "data", name="words", source={})
    asked: dict[str, Any] = {"split": "test", "max_documents": 7, "max_tokens": 20, "step": None, "seed": 0}
    found = measure_perplexity(
        str(tiny_folders["llama"]), tmp_path / "data", out=tmp_path / "out.json", **asked
    )
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert (found["texts"], found["tokens"], found["cut"]["documents"]) == (7, 7 * 19, 7)
    with pytest.raises(UserError, match="--step"):
        measure_perplexity(str(tiny_folders["llama"]), tmp_path / "data", out=None, **{**asked, "step": 3})


def test_equal_logits_have_the_perplexity_of_the_vocabulary(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", "llama, free head")
    model = torch_model("llama, free head")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    found = perplexity(load_model(folder).decoder, [[5, 6, 7, 8]])
    assert found.perplexity == pytest.approx(320, rel=1e-6)
