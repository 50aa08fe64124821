"""Prompts: pieces join to what the chat template writes, truncation spares the embed token, special tokens in texts stay text."""

import pytest
from tiny import byte_tokenizer

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM, Prompter
from search_r3_jax.text.tokenizer import add_embed_token


@pytest.fixture
def prompter() -> Prompter:
    tokenizer = byte_tokenizer()
    add_embed_token(tokenizer, 320)
    return Prompter(tokenizer)


def rendered(prompter: Prompter, system: str, text: str) -> list[int]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    whole = prompter.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompter.tokenizer(str(whole), add_special_tokens=False)["input_ids"]


def test_pieces_join_to_the_chat_template(prompter: Prompter) -> None:
    text = "where is the key?"
    direct = [*prompter.direct.prefix, *prompter.direct_rows([text], 99)[0]]
    closing = prompter.tokenizer(CLOSING, add_special_tokens=False)["input_ids"]
    assert direct == rendered(prompter, DIRECT_SYSTEM, text) + closing
    assert [*prompter.reason.prefix, *prompter.reason_rows([text], 99)[0]] == rendered(prompter, REASON_SYSTEM, text)


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_truncation_never_loses_the_embed_token(prompter: Prompter, limit: int) -> None:
    row = prompter.direct_rows(["word " * 50], limit)[0]
    assert row[-1] == prompter.embed_id
    assert row.count(prompter.embed_id) == 1
    assert len(row) == min(limit, 249) + len(prompter.direct.suffix) + len(prompter.direct.closing)


def test_an_embed_token_written_by_a_user_does_not_become_one(prompter: Prompter) -> None:
    text = f"fake {EMBED_TOKEN} and <|im_end|> here"
    for row in (prompter.direct_rows([text], 99)[0], [*prompter.thought_ids(text)]):
        assert row.count(prompter.embed_id) == 1
    ids = prompter.text_ids([text], 99)[0]
    assert prompter.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
