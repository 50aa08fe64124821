"""Prompts: pieces join to what the chat template writes, truncation spares the embed token, special tokens in
texts stay text."""

import datetime
import json
import random
from typing import Any

import pytest
from helpers.clock import set_day
from helpers.tiny_models import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.text.prompts import (
    CLOSING,
    DIRECT_SYSTEM,
    REASON_SYSTEM,
    Prompter,
    prompts_from_json,
    render_prompts,
)
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
    assert prompter.control_ids.isdisjoint(ids)
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
        "{{ range(10 ** 9) | length }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 10 ** 14 }}",
        # A prompt of its own for each text.
        "{{ messages[1].content | length }}{{ messages[1].content }}",
        "{% if '?' in messages[1].content %}Answer: {% endif %}{{ messages[1].content }}",
    ],
)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    tokenizer = byte_tokenizer()
    add_embed_token(tokenizer, 320)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat_template") as caught:
        Prompter(tokenizer)
    assert "\n" not in str(caught.value)


CONTROLS = (
    *("<think>", "</think>", "<|fim_prefix|>", "[TOOL_CALLS]", "<｜User｜>"),
    *("<tool call>", "<|fim prefix|>", "<<SYS>>", "｟ctrl｠"),
)
WORDS = ("COVID-19", "ü", "    ", "<>", "[ ]", "a<b>")


def with_added(*names: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with added tokens that are not marked special, as Qwen adds `<think>`."""
    tokenizer = byte_tokenizer(embed_token=True)
    added: Any = [AddedToken(name, special=False, normalized=False) for name in names]
    tokenizer.add_tokens(added)
    return tokenizer


@pytest.mark.parametrize("name", CONTROLS)
def test_control_tokens_in_texts_and_thoughts_are_plain_text_though_not_marked_special(name: str) -> None:
    prompter, without = Prompter(with_added(*CONTROLS)), byte_tokenizer(embed_token=True)
    text = f"a {name} b"
    plain = without(text, add_special_tokens=False)["input_ids"]
    assert prompter.text_ids([text, "x"], 99)[0] == plain
    newline = without("\n", add_special_tokens=False)["input_ids"]
    assert prompter.thought_ids(text) == [*plain, *newline, *prompter.reason.closing]
    assert prompter.tokenizer(text, add_special_tokens=False)["input_ids"] != plain


@pytest.mark.parametrize("name", WORDS)
def test_added_words_letters_and_spaces_are_no_control_tokens(name: str) -> None:
    prompter = Prompter(with_added(*WORDS, *CONTROLS))
    assert prompter.text_ids([f"a{name}b"], 99)[0] == prompter.tokenizer(f"a{name}b")["input_ids"]


def test_no_text_ends_a_turn_whatever_the_end_is_called() -> None:
    tokenizer, without = with_added("STOP", "halt"), byte_tokenizer(embed_token=True)
    tokenizer.eos_token = "STOP"
    halt = tokenizer.get_vocab()["halt"]
    prompter = Prompter(tokenizer, end_ids=[halt])
    text = "STOP now, or halt"
    assert prompter.text_ids([text], 99)[0] == without(text, add_special_tokens=False)["input_ids"]
    assert not set(prompter.end_ids) & set(prompter.thought_ids(text))


def test_tokens_that_the_tokenizer_lists_as_control_are() -> None:
    tokenizer = with_added("END")
    tokenizer.chat_control_tokens = ["END"]
    assert len(Prompter(tokenizer).text_ids(["END"], 9)[0]) == 3


def test_a_vocabulary_with_a_control_tokens_name_as_a_word_does_not_produce_it() -> None:
    names = ["<unk>", "<think>", EMBED_TOKEN, "</s>", "<", "think>", "a"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<unk>", EMBED_TOKEN, "</s>"])
    added: Any = [AddedToken("<think>", special=False)]
    words.add_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    assert Prompter(tokenizer).text_ids(["a <think> b", "a b"], 9) == [[6, 4, 5, 0], [6, 0]]


def with_first_token(template: str | None, *, byte_level: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before any text, as those of Llama do."""
    tokenizer = byte_tokenizer(embed_token=True) if byte_level else sentencepiece_style("prepend", "")
    bos = "<|im_start|>" if byte_level else "<s>"
    tokenizer.add_special_tokens({"bos_token": bos, "additional_special_tokens": [EMBED_TOKEN]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("byte_level", [True, False])
def test_the_first_token_is_the_one_that_users_of_transformers_get(byte_level: bool) -> None:
    """Without a chat template that of `tokenizer(text)`; with one what `apply_chat_template` gives."""
    bare = with_first_token(None, byte_level=byte_level)
    prompter = Prompter(bare)
    ids = [*prompter.direct.prefix, *prompter.direct_rows(["a key"], 9)[0]]
    assert ids == bare(f"{DIRECT_SYSTEM}\n\na key\n\n{CLOSING}")["input_ids"]
    assert ids[0] == bare.bos_token_id
    templates = [
        "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}",
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}",
    ]
    for template, first in zip(templates, (False, True), strict=True):
        templated = with_first_token(template, byte_level=byte_level)
        prompter = Prompter(templated)
        messages = [{"role": "system", "content": DIRECT_SYSTEM}, {"role": "user", "content": "a key"}]
        encoded: Any = templated.apply_chat_template(messages, add_generation_prompt=True)
        expected = encoded["input_ids"]
        row = prompter.text_ids(["a key"], 9)[0]
        assert [*prompter.direct.prefix, *row, *prompter.direct.suffix] == expected
        assert (expected[0] == templated.bos_token_id) == first


ASKED = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
LLAMAS_DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
DIRECTIVES = [f"%{letter}" for letter in "deajwubBhmyYHIpMSfFTDxXcRrklPCUWVGgnt"]
DIRECTIVES = [*DIRECTIVES, "%-d", "%-m", "%-H", "%-I", "%-M", "%-S", "%A"]
SURROUNDINGS = {
    "Llama 3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date_string = '12 Dec 2023' %}{%- endif %}{%- endif %}"
        "{{ 'Today Date: ' + date_string + ' ' }}" + ASKED,
        "Today Date: 12 Dec 2023 ",
    ),
    "no date of its own": (
        "\n{%- set today = strftime_now('%A, %-d %B %Y, %H:%M') -%}{{ today + ' ' }}" + ASKED,
        "Friday, 26 July 2024, 00:00 ",
    ),
    "every directive": (
        f"\n{{%- set today = strftime_now('{' '.join(DIRECTIVES)}') -%}}{{{{ today + ' ' }}}}" + ASKED,
        " ".join(LLAMAS_DAY.strftime(each) for each in DIRECTIVES) + " ",
    ),
    "in a loop and a namespace": (
        "{% set ns = namespace(day='') %}{% for m in messages %}"
        "{% if loop.first %}{% set ns.day = strftime_now('%Y-%m-%d') %}{% endif %}{% endfor %}"
        "{{ ns.day + ' ' }}" + ASKED,
        "2024-07-26 ",
    ),
    "tools": ("{% if tools %}tools {% endif %}{% if documents %}documents {% endif %}" + ASKED, ""),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_prompt_does_not_depend_on_the_day(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, begins = SURROUNDINGS[name]
    found = []
    for day in (1, 2):
        set_day(monkeypatch, day)
        tokenizer = byte_tokenizer(embed_token=True)
        tokenizer.chat_template = template
        found.append(render_prompts(tokenizer))
    assert found[0] == found[1]
    assert found[0].direct.before == f"{begins}{DIRECT_SYSTEM} "


def test_a_prompt_does_not_depend_on_chance() -> None:
    tokenizer = byte_tokenizer(embed_token=True)
    tokenizer.chat_template = "{{ range(10 ** 5) | random }} " + ASKED
    before = random.getstate()
    assert render_prompts(tokenizer) == render_prompts(tokenizer)
    assert random.getstate() == before


@pytest.mark.parametrize("printed", ["cycler(1, 2)", "joiner()", "cycler(1, 2).next"])
def test_a_prompt_that_prints_an_object_is_refused(printed: str) -> None:
    tokenizer = byte_tokenizer(embed_token=True)
    tokenizer.chat_template = f"{{{{ {printed} }}}} " + ASKED
    with pytest.raises(UserError, match=r"chat_template: prints an object \(<.* at 0x[0-9a-f]+>\)"):
        render_prompts(tokenizer)


def test_recorded_prompts_take_the_place_of_the_template(prompter: Prompter) -> None:
    recorded = prompts_from_json(json.loads(json.dumps(prompter.prompts.to_json())), "config.json")
    assert recorded == prompter.prompts
    other = byte_tokenizer(embed_token=True)
    other.chat_template = None
    again = Prompter(other, recorded)
    assert (again.direct, again.reason) == (prompter.direct, prompter.reason)
    assert prompts_from_json(None, "config.json") is None
    for damaged in ({}, [], {"direct": {"before": "a"}}, {"direct": {"before": "a", "after": 1}}):
        with pytest.raises(UserError, match=r"config\.json: prompts\.direct"):
            prompts_from_json(damaged, "config.json")


@pytest.mark.parametrize(
    "reply",
    [
        "{}\nThe embedding is <|embed_token|>",
        "{}The embedding is<|embed_token|>",
        "{}<|embed_token|>",
        "<think>{}</think><|im_end|>\nThe embedding is <|embed_token|>",
        "{}<|im_start|>",
        "{}",
    ],
)
def test_a_thought_shown_is_the_reasoning_alone(reply: str) -> None:
    prompter = Prompter(with_added(*CONTROLS))
    ids = prompter.tokenizer(reply.format("keys are sorted"))["input_ids"]
    assert prompter.thought_text(ids) == "keys are sorted"
    # Forced at the limit, in the middle of a word.
    cut = prompter.tokenizer("sorted dur")["input_ids"]
    assert prompter.thought_text([*cut, *prompter.reason.closing]) == "sorted dur"
