"""The two prompts, and the layout of a text within them."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2 import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.text.pieces import PieceTokenizer, control_tokens
from search_r3_jax.text.words import as_read

Mode = Literal["direct", "reason"]

DIRECT_SYSTEM = "Please represent user queries."
REASON_SYSTEM = (
    "Analyze the user query before you represent it: its intent, its key terms, and what a "
    "relevant passage contains. Be brief."
)
CLOSING_WORDS = "The embedding is"
CLOSING = f"{CLOSING_WORDS} {EMBED_TOKEN}"
# Two texts that have nothing in common but what marks their place.
_SLOTS = ("\ufffctext\ufffc", "\ufffcWhy 7 < 8?\nBecause.\ufffc")
# As Python prints what has no text of its own.
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")
# Chat templates may ask for the day. A prompt must be the same for ever: where a template has no date of its
# own for want of a clock, it gets Llama 3's, 26 July 2024, 00:00.
# Each stands on a line of its own before the template; Jinja trims the line break.
_NO_CLOCK = "{% set strftime_now = a_clock_that_there_is_not %}\n"
_FIXED = {
    **{"%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%a": "Fri", "%A": "Friday", "%w": "5", "%u": "5"},
    **{"%b": "Jul", "%B": "July", "%h": "Jul", "%m": "07", "%-m": "7", "%y": "24", "%Y": "2024"},
    **{"%H": "00", "%I": "12", "%p": "AM", "%M": "00", "%S": "00", "%f": "000000", "%z": "", "%Z": ""},
    **{"%F": "2024-07-26", "%T": "00:00:00", "%D": "07/26/24", "%x": "07/26/24", "%X": "00:00:00"},
    **{"%c": "Fri Jul 26 00:00:00 2024", "%s": "1721952000", "%R": "00:00", "%r": "12:00:00 AM"},
    **{"%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%k": " 0", "%l": "12", "%P": "am", "%C": "20"},
    **{"%U": "29", "%W": "30", "%V": "30", "%G": "2024", "%g": "24", "%n": "\\n", "%t": "\\t"},
}
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{value}')" for directive, value in _FIXED.items())
    + " }}{% endmacro %}\n"
)


class PromptText(NamedTuple):
    """A rendered prompt `before` and `after` a user's text, up to the assistant's reply."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The rendered prompts of both modes: recorded in a run and in an export, and used from then on."""

    direct: PromptText
    reason: PromptText

    def to_json(self) -> dict[str, dict[str, str]]:
        """As JSON: mode → `before` and `after`."""
        return {"direct": self.direct._asdict(), "reason": self.reason._asdict()}


def prompts_from_json(fields: object, where: str) -> Prompts | None:
    """The prompts that `Prompts.to_json` wrote; None where an older version recorded none.

    Raises UserError for anything else.
    """
    if fields is None:
        return None
    modes = {}
    for mode in ("direct", "reason"):
        parts = fields.get(mode) if isinstance(fields, dict) else None
        texts = [parts.get(part) if isinstance(parts, dict) else None for part in PromptText._fields]
        before, after = (text if isinstance(text, str) else None for text in texts)
        if before is None or after is None:
            raise UserError(
                f"{where}: prompts.{mode}: not the texts before and after a user's; restore the file"
            )
        modes[mode] = PromptText(before, after)
    return Prompts(**modes)


@dataclass(frozen=True, kw_only=True)
class PromptIds:
    """Token ids around a user's text.

    Attributes:
        prefix: the same for every text: its keys and values are computed once and shared.
        suffix: closes the user's turn and opens the assistant's.
        closing: ends every reply; its last id is the embed token.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    closing: tuple[int, ...]


def render_prompts(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The prompts under the tokenizer's chat template, whatever the day.

    Without a template they are plain text behind the token that the tokenizer puts before any text. Raises
    UserError when the chat template fails or changes the text.
    """
    return Prompts(direct=_rendered(tokenizer, DIRECT_SYSTEM), reason=_rendered(tokenizer, REASON_SYSTEM))


def _rendered(tokenizer: PreTrainedTokenizerBase, system: str) -> PromptText:
    if not tokenizer.chat_template:
        return PromptText(f"{_first_token(tokenizer)}{system}\n\n", "\n\n")
    prompts = set[PromptText]()
    for slot in _SLOTS:
        rendered = _from_template(tokenizer, system, slot)
        if rendered.count(slot) != 1:
            raise UserError(
                "tokenizer: chat_template: does not repeat the user's text once and unchanged; mend the "
                "template"
            )
        _refuse_addresses(rendered)
        prompts.add(PromptText(*rendered.split(slot)))
    if len(prompts) > 1:
        raise UserError(
            "tokenizer: chat_template: writes other words around another user's text; mend the template"
        )
    return prompts.pop()


def _refuse_addresses(rendered: str) -> None:
    """Raise UserError for a prompt that holds an object's address."""
    if found := _ADDRESS.search(rendered):
        raise UserError(
            f"tokenizer: chat_template: prints an object ({found[0]}), and so another prompt in each "
            "process; mend the template"
        )


def _from_template(tokenizer: PreTrainedTokenizerBase, system: str, text: str) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]

    def render(clock: str) -> str:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = clock + template
        with _seeded():
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )

    try:
        try:
            return render(_NO_CLOCK)
        except UndefinedError:
            return render(_FIXED_CLOCK)
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
        MemoryError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"tokenizer: chat_template: fails on a system prompt and a user's text ({reason}); mend the "
            "template"
        ) from None


@contextmanager
def _seeded() -> Iterator[None]:
    """Jinja's filter `random` gives the same result for ever."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before any text, such as `<s>`; empty where it puts none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if whole[:1] == [bos] and bare[:1] != [bos] else ""


class Prompter:
    """Turns texts into token ids, in direct and in reasoned mode.

    Attributes:
        prompts: the rendered prompts.
        end_ids: tokens that end a turn, that of the tokenizer first.
        control_ids: tokens that no text produces and no reader is shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts | None = None,
        *,
        end_ids: Collection[int] = (),
    ):
        """Without `prompts`, the chat template renders them; `end_ids` end a turn beside the tokenizer's own.

        Raises UserError where the tokenizer lacks a token, or its chat template fails.
        """
        if EMBED_TOKEN not in tokenizer.get_vocab():
            raise UserError(
                f"tokenizer: {EMBED_TOKEN}: not in the vocabulary; add it before building prompts"
            )
        if tokenizer.eos_token is None or str(tokenizer.eos_token) not in tokenizer.get_vocab():
            raise UserError(
                "tokenizer: eos_token: not in the vocabulary; name the token that ends a turn in "
                "tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.embed_id = int(tokenizer.get_vocab()[EMBED_TOKEN])
        eos_id = int(tokenizer.get_vocab()[str(tokenizer.eos_token)])
        self.end_ids = tuple(dict.fromkeys([eos_id, *sorted(set(end_ids) - {self.embed_id})]))
        self.control_ids = frozenset([*control_tokens(tokenizer).values(), *self.end_ids, self.embed_id])
        self.prompts = prompts or render_prompts(tokenizer)
        self._pieces = PieceTokenizer(tokenizer, self.end_ids)
        before, after = self.prompts.direct
        # A word keeps the space before it: most vocabularies have the two as one token.
        self._lead = " " if before.endswith(" ") else ""
        self._text_begins = self._pieces.begins_after(before)
        self._reply_begins = self._pieces.begins_after(after)
        self.direct = self._prompt_ids(self.prompts.direct, closing_begins=self._reply_begins)
        # After a thought: never at the beginning of the reply.
        self.reason = self._prompt_ids(self.prompts.reason, closing_begins=False)

    def _prompt_ids(self, prompt: PromptText, *, closing_begins: bool) -> PromptIds:
        before, after = prompt
        return PromptIds(
            prefix=tuple(self._pieces.ids(before.removesuffix(self._lead), begins=True)),
            suffix=tuple(self._pieces.ids(after, begins=False)),
            closing=tuple(self._pieces.ids(CLOSING, begins=closing_begins)),
        )

    def of(self, mode: Mode) -> PromptIds:
        """The prompt of a mode."""
        return self.direct if mode == "direct" else self.reason

    def text_ids(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of the texts alone, cut to `max_tokens`; names of control tokens stay plain text."""
        if not texts:
            return []
        # Trimmed: a leading newline would merge with the prompt's own and change the shared prefix.
        plain = [self._lead + as_read(text) for text in texts]
        return [row[:max_tokens] for row in self._pieces.plain_ids(plain, begins=self._text_begins)]

    def direct_rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids after the shared prefix in direct mode: text, suffix, closing.

        `max_tokens` cuts the text only, never the embed token.
        """
        return self.with_tail(self.text_ids(texts, max_tokens))

    def with_tail(self, text_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """`direct_rows` of texts whose ids are known."""
        tail = [*self.direct.suffix, *self.direct.closing]
        return [[*ids, *tail] for ids in text_ids]

    def reason_rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids after the shared prefix in reasoned mode, up to the assistant's reply."""
        return [ids + list(self.reason.suffix) for ids in self.text_ids(texts, max_tokens)]

    def replied_rows(
        self, texts: Sequence[str], replies: Sequence[Sequence[int]], max_tokens: int
    ) -> list[list[int]]:
        """`reason_rows` with each text's complete reply behind it; `max_tokens` cuts the texts alone."""
        return [
            [*row, *reply] for row, reply in zip(self.reason_rows(texts, max_tokens), replies, strict=True)
        ]

    def thought_ids(self, thought: str, max_tokens: int | None = None) -> list[int]:
        """A reasoned reply: the thought, cut to `max_tokens`, then the closing with the embed token.

        Names of control tokens in the thought stay plain text.
        """
        text = as_read(thought) + "\n"
        ids = self._pieces.plain_ids([text], begins=self._reply_begins)[0]
        return [*ids[:max_tokens], *self.reason.closing]

    def thought_text(self, reply: Sequence[int]) -> str:
        """The reasoning alone of a reply: without the closing, forced or written, and control tokens."""
        closing = self.reason.closing
        written = reply[: -len(closing)] if tuple(reply[-len(closing) :]) == closing else reply
        text = str(self.tokenizer.decode([token for token in written if token not in self.control_ids]))
        return text.strip().removesuffix(CLOSING_WORDS).strip()
