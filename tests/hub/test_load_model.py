"""What surrounds a text: the ends of a turn and the prompts of a loaded model, against `transformers`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.clock import set_day
from helpers.exported_models import run_snippet, snippets
from helpers.tiny_models import CHAT_TEMPLATE, write_tiny_checkpoint
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, GenerationConfig

from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import load_model

DATED_TEMPLATE = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE
TEXTS = ["sort a list by key", "a <think> b <|im_end|>"]


def write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes token 0, `<|endoftext|>`, and nothing else."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("silent"), "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("ends", [[2, 0], 0, [0], [2], None])
def test_each_end_of_generation_config_ends_a_thought_as_it_ends_generate(silent: Path, ends: Any) -> None:
    write_json(silent / "generation_config.json", {"eos_token_id": ends, "pad_token_id": 0})
    # Any: transformers declares a wider class.
    theirs: Any = AutoModelForCausalLM.from_pretrained(silent)
    written = theirs.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, do_sample=False).shape[1] - 3
    model = load_model(silent)
    thought = Embedder(model, max_think_tokens=5).think("hello")
    assert thought.tokens == written + len(model.prompter().reason.closing)
    assert (thought.text, thought.valid) == ("", False)
    # Its thought may be read; its vector, which is zero, is not given to a search.
    with pytest.raises(UserError, match="its embedding is zero"):
        Embedder(model, max_think_tokens=5).encode("hello", mode="reason")


def test_ends_come_from_config_without_a_generation_config_and_are_exported(
    silent: Path, tmp_path: Path
) -> None:
    (silent / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((silent / "config.json").read_text())
    write_json(silent / "config.json", config | {"eos_token_id": [7, 0, 10**6]})
    model = load_model(silent)
    assert model.prompter().end_ids == (2, 0, 7)
    out = export_model(model, tmp_path / "out")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 0, 7, model.embed_id]
    assert load_model(out).prompter().end_ids == (2, 0, 7)


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>"], [2.5], True, {"a": 1}])
def test_an_end_that_is_no_id_is_one_line(silent: Path, ends: Any) -> None:
    write_json(silent / "generation_config.json", {"eos_token_id": ends})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: .*; give the id of a token"):
        load_model(silent)


def test_a_model_and_its_export_agree_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedder on both, sentence-transformers, and the card's snippet for transformers."""
    folder = write_tiny_checkpoint(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").write_text(DATED_TEMPLATE)
    set_day(monkeypatch, 1)
    before = Embedder.load(folder).encode(TEXTS)
    out = export_model(load_model(folder), tmp_path / "out")
    set_day(monkeypatch, 2)
    np.testing.assert_array_equal(Embedder.load(folder).encode(TEXTS), before)
    np.testing.assert_array_equal(Embedder.load(out).encode(TEXTS), before)
    np.testing.assert_allclose(SentenceTransformer(str(out)).encode(TEXTS), before, atol=1e-5)
    card = run_snippet(snippets(out)[0])
    np.testing.assert_allclose(card["embed"](TEXTS[0]), before[0], atol=1e-5)
    # The record decides, whatever becomes of the template.
    (out / "chat_template.jinja").write_text("{{ 'Other: ' }}" + CHAT_TEMPLATE)
    np.testing.assert_array_equal(Embedder.load(out).encode(TEXTS), before)
