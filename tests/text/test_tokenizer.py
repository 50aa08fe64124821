"""The embed token gets a row, and a GGUF tokenizer keeps text intact."""

import pytest
from tiny import byte_tokenizer

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.hub.checkpoint import resolve
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.text.tokenizer import add_embed_token, tokenizer_from_gguf


def test_a_padded_row_is_reused_and_else_the_matrix_grows_to_a_multiple_of_128() -> None:
    assert add_embed_token(byte_tokenizer(), 320)[1:] == (259, 320, False)
    assert add_embed_token(byte_tokenizer(), 259)[1:] == (259, 384, False)


def test_adding_twice_gives_the_same_id() -> None:
    tokenizer = byte_tokenizer()
    first = add_embed_token(tokenizer, 320)
    assert add_embed_token(tokenizer, 320) == first
    assert tokenizer.decode([1, first.embed_id], skip_special_tokens=True) == ""
    assert tokenizer.decode([first.embed_id]) == EMBED_TOKEN


@pytest.mark.parametrize(
    "text", ["naïve café 日本語 \t tabs\n\n newlines", "def f(x):\n    return x ** 2  # 1234", "  a  b ", "😀 it's 3.14%"]
)
def test_gguf_tokenizer_round_trips_text_and_splits_digits(text: str) -> None:
    tokenizer = tokenizer_from_gguf(GgufFile(resolve("smollm2")).tokenizer_fields(), "smollm2")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(character.isdigit() for character in piece))
