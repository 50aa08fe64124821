"""The two prompts, and the layout of a text within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError
from search_r3_jax.text.pieces import PieceTokenizer

Mode = Literal["direct", "reason"]

DIRECT_SYSTEM = "Please represent user queries."
REASON_SYSTEM = (
    "Analyze the user query before you represent it: its intent, its key terms, and what a "
    "relevant passage contains. Be brief."
)
CLOSING = f"The embedding is {EMBED_TOKEN}"
_SLOT = "\ufffctext\ufffc"


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


def prompt_text(tokenizer: PreTrainedTokenizerBase, system: str) -> tuple[str, str]:
    """The prompt before and after a user's text, up to the assistant's reply.

    Raises UserError when the chat template fails or changes the text.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _SLOT}]
    if tokenizer.chat_template:
        try:
            rendered = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"tokenizer: chat_template: fails on a system prompt and a user's text ({reason}); mend the "
                "template"
            ) from None
    else:
        rendered = f"{system}\n\n{_SLOT}\n\n"
    if rendered.count(_SLOT) != 1:
        raise UserError(
            "tokenizer: chat_template: does not repeat the user's text once and unchanged; mend the template"
        )
    before, after = rendered.split(_SLOT)
    return before, after


class Prompter:
    """Turns texts into token ids, in direct and in reasoned mode."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
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
        self.eos_id = int(tokenizer.get_vocab()[str(tokenizer.eos_token)])
        self._pieces = PieceTokenizer(tokenizer)
        before, after = prompt_text(tokenizer, DIRECT_SYSTEM)
        # A word keeps the space before it: most vocabularies have the two as one token.
        self._lead = " " if before.endswith(" ") else ""
        self._text_begins = self._pieces.begins_after(before)
        self._reply_begins = self._pieces.begins_after(after)
        self.direct = self._prompt_ids(DIRECT_SYSTEM, closing_begins=self._reply_begins)
        # After a thought: never at the beginning of the reply.
        self.reason = self._prompt_ids(REASON_SYSTEM, closing_begins=False)

    def _prompt_ids(self, system: str, *, closing_begins: bool) -> PromptIds:
        before, after = prompt_text(self.tokenizer, system)
        return PromptIds(
            prefix=tuple(self._pieces.ids(before.removesuffix(self._lead), begins=True)),
            suffix=tuple(self._pieces.ids(after, begins=False)),
            closing=tuple(self._pieces.ids(CLOSING, begins=closing_begins)),
        )

    def of(self, mode: Mode) -> PromptIds:
        """The prompt of a mode."""
        return self.direct if mode == "direct" else self.reason

    def text_ids(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of the texts alone, cut to `max_tokens`; names of special tokens stay plain text."""
        if not texts:
            return []
        # Trimmed: a leading newline would merge with the prompt's own and change the shared prefix.
        plain = [self._lead + text.strip().replace(EMBED_TOKEN, "") for text in texts]
        return [row[:max_tokens] for row in self._pieces.plain_ids(plain, begins=self._text_begins)]

    def direct_rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids after the shared prefix in direct mode: text, suffix, closing.

        `max_tokens` cuts the text only, never the embed token.
        """
        tail = [*self.direct.suffix, *self.direct.closing]
        return [ids + tail for ids in self.text_ids(texts, max_tokens)]

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
        """A reasoned reply: the thought, cut to `max_tokens`, then the closing with the embed token."""
        ids = self._pieces.ids(thought.strip().replace(EMBED_TOKEN, "") + "\n", begins=self._reply_begins)
        return [*ids[:max_tokens], *self.reason.closing]
