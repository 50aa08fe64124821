"""Prompts: pieces join to what the chat template writes, truncation spares the embed token, special tokens in
texts stay text."""

import pytest
from helpers.tiny_models import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
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
    assert [*prompter.reason.prefix, *prompter.reason_rows([text], 99)[0]] == rendered(
        prompter, REASON_SYSTEM, text
    )


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


LLAMA2_TEMPLATE = (
    "{{ '<s>[INST] <<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + messages[1]['content'] + ' "
    "[/INST]' }}"
    "{% if messages|length > 2 %}{{ ' ' + messages[2]['content'] }}{% endif %}"
)
# One ends the prompt's beginning with a space, one with a special token.
SPACE_TEMPLATE = "{{ '<s>' + messages[0]['content'] + ' Q: ' + messages[1]['content'] + '\nA:' }}"
TOKEN_TEMPLATE = (
    "{{ '<s>' + messages[0]['content'] + '<|user|>' + messages[1]['content'] + '<|assistant|>' }}"
)
# Text stands between two special tokens.
TURNS_TEMPLATE = (
    "{{ '<s>' + messages[0]['content'] + '</s>\n<|user|>' + messages[1]['content'] + "
    "'</s>\n<|assistant|>\n' }}"
)


def sentencepiece_style(kind: str, template: str) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE over `▁`, by the old normaliser or by Metaspace."""
    words = [
        "▁the",
        "▁where",
        "▁is",
        "▁key",
        "key",
        "where",
        "is",
        "the",
        "▁The",
        "The",
        "▁[",
        "▁embedding",
        "▁Q",
        "▁user",
        "▁▁",
    ]
    letters = sorted(
        {letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyzPQAINSTY[]/<>:.,?! |_")
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in ("<s>", "</s>", "<|user|>", "<|assistant|>")
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", [LLAMA2_TEMPLATE, SPACE_TEMPLATE, TOKEN_TEMPLATE, TURNS_TEMPLATE])
@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
@pytest.mark.parametrize("text", ["where is the key?", "key", "[a] b", "é"])
def test_sentencepiece_pieces_join_to_the_ids_of_the_whole(kind: str, template: str, text: str) -> None:
    prompter = Prompter(add_embed_token(sentencepiece_style(kind, template), 2000).tokenizer)
    messages = [{"role": "system", "content": DIRECT_SYSTEM}, {"role": "user", "content": text}]
    whole = str(prompter.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    expected = prompter.tokenizer(whole + CLOSING, add_special_tokens=False)["input_ids"]
    assert [*prompter.direct.prefix, *prompter.direct_rows([text], 99)[0]] == expected
    thought = prompter.tokenizer(whole + "the key\n" + CLOSING, add_special_tokens=False)["input_ids"]
    direct = [*prompter.direct.prefix, *prompter.text_ids([text], 99)[0], *prompter.direct.suffix]
    assert direct + prompter.thought_ids("the key") == thought


def test_sentencepiece_text_with_special_tokens_stays_text() -> None:
    prompter = Prompter(add_embed_token(sentencepiece_style("prepend", LLAMA2_TEMPLATE), 2000).tokenizer)
    ids = prompter.text_ids([f"</s> is {EMBED_TOKEN}"], 99)[0]
    assert prompter.eos_id not in ids
    assert prompter.embed_id not in ids


def test_without_a_template_prompts_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    prompter = Prompter(add_embed_token(tokenizer, 320).tokenizer)
    ids = [*prompter.direct.prefix, *prompter.direct_rows(["a key"], 9)[0]]
    assert tokenizer.decode(ids) == f"{DIRECT_SYSTEM}\n\na key\n\n{CLOSING}"


def test_without_an_end_token_it_is_one_line() -> None:
    tokenizer = byte_tokenizer()
    add_embed_token(tokenizer, 320)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        Prompter(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system prompt') }}",
        "{% for",
        "{{ messages[0]['content'] }}",
        "{{ messages[1]['content'] * 2 }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    tokenizer = byte_tokenizer()
    add_embed_token(tokenizer, 320)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat_template") as caught:
        Prompter(tokenizer)
    assert "\n" not in str(caught.value)
