"""Token ids of a string's parts that concatenate to the ids of the whole string."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class PieceTokenizer:
    """Tokenises parts of a string.

    Only a part that `begins` a string, and text behind an added token within a part, may get the space that
    SentencePiece puts before strings (`▁`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._inner: Tokenizer | None = None
        self._inner_plain: Tokenizer | None = None
        self._added: set[int] = set()
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            written = json.loads(tokenizer.backend_tokenizer.to_str())
            changed = written | {
                part: _without_prefix(written[part]) for part in ("normalizer", "pre_tokenizer")
            }
            if changed != written:
                self._inner, self._inner_plain = (
                    Tokenizer.from_str(json.dumps(changed)),
                    Tokenizer.from_str(json.dumps(changed)),
                )
                self._inner_plain.encode_special_tokens = True
                self._added = set(self._inner.get_added_tokens_decoder())

    def ids(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a part, special tokens recognised."""
        if begins or self._inner is None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        encoding = self._inner.encode(text, add_special_tokens=False)
        at = next((i for i, token in enumerate(encoding.ids) if token in self._added), None)
        if at is None:
            return encoding.ids
        # An added token splits a string: what is behind it may begin another.
        return encoding.ids[:at] + self.ids(text[encoding.offsets[at][0] :], begins=True)

    def plain_ids(self, texts: Sequence[str], *, begins: bool) -> list[list[int]]:
        """Ids of parts in which a special token's name is plain text."""
        if begins or self._inner_plain is None:
            return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return [
            encoding.ids for encoding in self._inner_plain.encode_batch(list(texts), add_special_tokens=False)
        ]

    def begins_after(self, before: str) -> bool:
        """Whether the tokenizer treats text after `before` as the beginning of a string.

        Some do so after a special token.
        """
        return self.ids(f"{before}a", begins=True) == self.ids(before, begins=True) + self.ids(
            "a", begins=True
        )


def _without_prefix(part: Any) -> Any:
    """A normaliser or pre-tokenizer of tokenizer.json that adds nothing to the front of a text; None is no
    such step."""
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None if isinstance(part, dict) else part
    changed = dict(part)
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            changed[key] = [step for step in map(_without_prefix, part[key]) if step is not None]
    return changed
