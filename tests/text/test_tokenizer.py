"""The embed token gets a row that reloads under the same id, and a GGUF tokenizer keeps text intact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from helpers.tiny_gguf import BYTES, finish, write_tokenizer
from helpers.tiny_models import SPECIAL, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.text.tokenizer import add_embed_token, tokenizer_from_folder, tokenizer_from_gguf

TEXTS = [
    "naïve café 日本語 \t tabs\n\n newlines",
    "def f(x):\n    return x ** 2  # 1234",
    "  a  b ",
    "😀 it's 3.14%",
    "WE'LL see, 12345 times...",
]


def with_reserved(count: int = 3) -> PreTrainedTokenizerBase:
    """259 ids and special tokens that nobody uses, named as Llama 3 names them."""
    tokenizer = byte_tokenizer()
    names: Any = [
        AddedToken(f"<|reserved_special_token_{i}|>", normalized=False, special=True) for i in range(count)
    ]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def reloaded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))


def test_a_padded_row_is_reused_and_else_the_matrix_grows_to_a_multiple_of_128() -> None:
    assert add_embed_token(byte_tokenizer(), 320)[1:] == (259, 320, True)
    assert add_embed_token(byte_tokenizer(), 259)[1:] == (259, 384, True)


def test_a_reserved_token_is_taken_over_only_where_no_padded_row_is_free() -> None:
    assert add_embed_token(with_reserved(), 320)[1:] == (262, 320, True)
    taken = add_embed_token(with_reserved(), 262)
    assert taken[1:] == (259, 262, True)
    assert "<|reserved_special_token_0|>" not in taken.tokenizer.get_vocab()
    assert len(taken.tokenizer) == 262
    assert add_embed_token(taken.tokenizer, 262)[1:] == (259, 262, False)


def test_a_reserved_token_that_the_template_or_the_end_uses_is_left_alone() -> None:
    tokenizer = with_reserved()
    tokenizer.eos_token = "<|reserved_special_token_0|>"
    tokenizer.chat_template = "{{ '<|reserved_special_token_1|>' }}"
    assert add_embed_token(tokenizer, 262).embed_id == 261


@pytest.mark.parametrize("vocab_size", [320, 262])
@pytest.mark.parametrize("reserved", [0, 3])
@pytest.mark.parametrize("template", [True, False])
def test_saved_and_reloaded_it_has_the_same_id(
    tmp_path: Path, vocab_size: int, reserved: int, template: bool
) -> None:
    tokenizer = with_reserved(reserved)
    if not template:
        tokenizer.chat_template = None
    before = dict(tokenizer.get_vocab())
    embed = add_embed_token(tokenizer, min(vocab_size, 259 + reserved) if vocab_size == 262 else vocab_size)
    again = reloaded(embed.tokenizer, tmp_path)
    assert again.convert_tokens_to_ids(EMBED_TOKEN) == embed.embed_id
    text = f"a {EMBED_TOKEN}<|im_end|>"
    assert again(text)["input_ids"] == [before["a"], before["Ġ"], embed.embed_id, before["<|im_end|>"]]
    assert again.decode([embed.embed_id]) == EMBED_TOKEN
    assert again.decode([1, embed.embed_id], skip_special_tokens=True) == ""
    assert (again.chat_template is not None) == template
    assert {token: i for token, i in again.get_vocab().items() if i != embed.embed_id} == {
        token: i for token, i in before.items() if i != embed.embed_id
    }


def test_without_end_and_padding_token_it_saves_and_reloads(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = None, None, None
    embed = add_embed_token(tokenizer, 320)
    again = reloaded(embed.tokenizer, tmp_path)
    assert again.convert_tokens_to_ids(EMBED_TOKEN) == embed.embed_id
    assert again.eos_token is None


def test_adding_twice_gives_the_same_id() -> None:
    tokenizer = byte_tokenizer()
    first = add_embed_token(tokenizer, 320)
    assert add_embed_token(tokenizer, 320)[1:] == (first.embed_id, 320, False)
    assert tokenizer.decode([1, first.embed_id], skip_special_tokens=True) == ""
    assert tokenizer.decode([first.embed_id]) == EMBED_TOKEN


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}', "[]"])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    byte_tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        tokenizer_from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_tokenizer_round_trips_text_and_splits_digits(text: str) -> None:
    tokenizer = tokenizer_from_gguf(GgufFile(resolve("smollm2")).tokenizer_fields(), "smollm2")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(character.isdigit() for character in piece))


def gguf_tokenizer_file(folder: Path, pre: str, *, padding: int = 5, eos: int | None = 2) -> Path:
    """A tokenizer with merges learned from `TEXTS`: special tokens, a user-defined one, and rows that only
    fill up."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=BYTES, show_progress=False)
    )
    learned = learner.get_vocab()
    merges = [pair for pair in learned if len(pair) > 1]
    written = [" ".join(merge) for merge in _merges(learner)]
    tokens = [*SPECIAL, *BYTES, *(token for token in sorted(merges, key=learned.__getitem__)), "<tool>"]
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4] + [5] * padding
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    filled = [*tokens, *(f"[PAD{i}]" for i in range(padding))]
    write_tokenizer(writer, tokens=filled, merges=written, kinds=kinds, pre=pre, eos=eos)
    writer.add_tensor("token_embd.weight", np.zeros((len(filled), 32), np.float32))
    finish(writer)
    return folder / "model.gguf"


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("pre", ["default", "qwen2", "llama-bpe"])
def test_gguf_tokenizers_equal_those_of_transformers(tmp_path: Path, pre: str) -> None:
    file = gguf_tokenizer_file(tmp_path, pre)
    ours = tokenizer_from_gguf(GgufFile(file).tokenizer_fields(), str(file))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    for text in [*TEXTS, "a<|im_start|>b <tool> c<|im_end|>"]:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.eos_token == "<|im_end|>"
    assert ours.decode(ours("x<|im_end|><tool>")["input_ids"], skip_special_tokens=True) == "x<tool>"


def test_the_three_pre_tokenizers_are_not_the_same(tmp_path: Path) -> None:
    found = {}
    for pre in ("default", "qwen2", "llama-bpe", "smollm"):
        (tmp_path / pre).mkdir()
        file = gguf_tokenizer_file(tmp_path / pre, pre)
        backend = tokenizer_from_gguf(GgufFile(file).tokenizer_fields(), str(file)).backend_tokenizer
        found[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a 12345\n\n WE'LL")]
    assert found["default"] == ["a", "Ġ12345", "ĊĊ", "ĠWE", "'", "LL"]
    assert found["smollm"] == ["a", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "ĠWE", "'", "LL"]
    assert found["qwen2"] == ["a", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "ĠWE", "'LL"]
    assert found["llama-bpe"] == ["a", "Ġ", "123", "45", "ĊĊ", "ĠWE", "'LL"]


def test_rows_that_only_fill_up_are_free_and_no_end_is_allowed(tmp_path: Path) -> None:
    file = gguf_tokenizer_file(tmp_path, "default", padding=7, eos=None)
    source = GgufFile(file)
    tokenizer = tokenizer_from_gguf(source.tokenizer_fields(), str(file))
    assert tokenizer.eos_token is None
    assert add_embed_token(tokenizer, source.config.vocab_size)[1:] == (
        source.config.vocab_size - 7,
        source.config.vocab_size,
        True,
    )
