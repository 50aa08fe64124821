"""What is said of the data before a run trains on it."""

import re
from typing import Any, Literal

import pytest
from helpers.tiny_models import byte_tokenizer, word_collection

from search_r3_jax.config import RunConfig, TextConfig, config_from_dict
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.loading import check_sizes, log_cut_texts


def test_texts_that_training_cuts_are_told(log_lines: list[str]) -> None:
    collection = word_collection(documents=20, queries=10)
    prompter = Prompter(byte_tokenizer(embed_token=True))
    lengths = [len(document.body.encode()) for document in collection.documents]
    most = max(lengths) - 1
    longer = sum(length > most for length in lengths)
    log_cut_texts(prompter, TextConfig(max_query_tokens=999, max_document_tokens=most), collection)
    assert log_lines == [
        f"{collection.name}: {longer / 20:.0%} of the documents are longer than text.max_document_tokens "
        f"{most}; the rest of each is not read"
    ]
    log_lines.clear()
    log_cut_texts(prompter, TextConfig(max_query_tokens=999, max_document_tokens=999), collection)
    assert log_lines == []


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"sft.matryoshka": (32, 65)}, "sft.matryoshka: 65: the model's vectors have 64 numbers"),
        ("rl", {"sft.matryoshka": (65,)}, ""),
        (
            "sft",
            {"text.max_document_tokens": 600},
            "text.max_document_tokens: 600: of the model's 512 positions",
        ),
        ("rl", {"text.max_query_tokens": 511}, "text.max_query_tokens: 511: of the model's 512"),
        ("rl", {"rl.sampler.max_think_tokens": 500}, "text.max_query_tokens, rl.sampler.max_think_tokens: "),
        ("sft", {"rl.sampler.max_think_tokens": 500}, ""),
        ("sft", {}, ""),
    ],
)
def test_what_is_larger_than_the_model_is_a_mistake(
    tiny_model: LoadedModel, stage: Literal["sft", "rl"], changes: dict[str, Any], message: str
) -> None:
    fields: dict[str, Any] = {}
    for path, value in changes.items():
        at = fields
        *sections, name = path.split(".")
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    config = config_from_dict(RunConfig, fields)
    if message:
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            check_sizes(config, tiny_model, stage)
    else:
        check_sizes(config, tiny_model, stage)
