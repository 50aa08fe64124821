"""The two prompts, in one place, and how a text is laid out between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError

Mode = Literal["direct", "reason"]

DIRECT_SYSTEM = "Please represent user queries."
REASON_SYSTEM = "Analyze the user query before you represent it: its intent, its key terms, and what a relevant passage contains. Be brief."
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
    """What stands before and after a user's text, up to where the assistant begins to write."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _SLOT}]
    if tokenizer.chat_template:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        rendered = f"{system}\n\n{_SLOT}\n\n"
    before, after = rendered.split(_SLOT)
    return before, after


class Prompter:
    """Turns texts into token ids, in direct and in reasoned mode."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if EMBED_TOKEN not in tokenizer.get_vocab():
            raise UserError(f"tokenizer: {EMBED_TOKEN}: not in the vocabulary; add it before building prompts")
        self.tokenizer = tokenizer
        self.embed_id = int(tokenizer.get_vocab()[EMBED_TOKEN])
        self.eos_id = int(tokenizer.get_vocab()[str(tokenizer.eos_token)])
        self.direct = self._prompt_ids(DIRECT_SYSTEM)
        self.reason = self._prompt_ids(REASON_SYSTEM)

    def _prompt_ids(self, system: str) -> PromptIds:
        before, after = prompt_text(self.tokenizer, system)
        return PromptIds(prefix=self._ids(before), suffix=self._ids(after), closing=self._ids(CLOSING))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def of(self, mode: Mode) -> PromptIds:
        """The prompt of a mode."""
        return self.direct if mode == "direct" else self.reason

    def text_ids(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Ids of the user's texts alone, cut to `max_tokens`; a special token written in a text stays plain text."""
        if not texts:
            return []
        # Trimmed: a leading newline would merge with the prompt's own and change the shared prefix.
        plain = [text.strip().replace(EMBED_TOKEN, "") for text in texts]
        ids = self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [row[:max_tokens] for row in ids]

    def direct_rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """What follows the shared prefix in direct mode: text, suffix, closing; truncation never reaches the embed token."""
        tail = [*self.direct.suffix, *self.direct.closing]
        return [ids + tail for ids in self.text_ids(texts, max_tokens)]

    def reason_rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """What follows the shared prefix in reasoned mode, up to where the assistant begins to write."""
        return [ids + list(self.reason.suffix) for ids in self.text_ids(texts, max_tokens)]

    def thought_ids(self, thought: str) -> list[int]:
        """A complete reasoned reply: the thought, then the closing with the embed token."""
        return [*self._ids(thought.strip().replace(EMBED_TOKEN, "") + "\n"), *self.reason.closing]
