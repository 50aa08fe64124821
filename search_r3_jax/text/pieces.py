"""Token ids of a string's parts that concatenate to the ids of the whole string."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# `<think>`, `[TOOL_CALLS]`, `<|fim prefix|>`, `<<SYS>>`, `｟ctrl｠`: a name in brackets. Added words, spaces
# and letters are not.
_BRACKETED = re.compile(r"[<\[{｟【⟨]+[^<>\[\]{}｟｠【】⟨⟩\n]*\w[^<>\[\]{}｟｠【】⟨⟩\n]*[>\]}｠】⟩]+")


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that a text must not produce, with their ids.

    They are the special tokens; the added tokens that are names in brackets, which Qwen and others do not
    mark as special (`<think>`, `<tool_call>`); and those that the tokenizer lists as `chat_control_tokens`.
    """
    listed = set(tokenizer.chat_control_tokens or ())
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in listed or _BRACKETED.fullmatch(token.content.strip())
    }


class PieceTokenizer:
    """Tokenises parts of a string.

    Only a part that `begins` a string, and text behind an added token within a part, may get the space that
    SentencePiece puts before strings (`▁`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()):
        """Added tokens among `ends`, which end a turn, are control tokens too, whatever their names."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._controls = control_tokens(tokenizer) | {added[i].content: i for i in ends if i in added}
        # Unknown characters give this id, whatever the text.
        self._forbidden = frozenset(
            token for token in self._controls.values() if token != tokenizer.unk_token_id
        )
        self._inner: Tokenizer | None = None
        # By whether the part begins a string; None is the tokenizer itself.
        self._plain: dict[bool, Tokenizer | None] = {True: None, False: None}
        self._added: set[int] = set()
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            written = json.loads(tokenizer.backend_tokenizer.to_str())
            changed = written | {
                part: _without_prefix(written[part]) for part in ("normalizer", "pre_tokenizer")
            }
            controls = self._controls.keys()
            unmarked = any(
                token["content"] in controls and not token["special"] for token in written["added_tokens"]
            )
            if unmarked:
                self._plain[True] = self._plain[False] = _plain_tokenizer(written, controls)
            if changed != written:
                self._inner = _tokenizer(changed)
                self._plain[False] = _plain_tokenizer(changed, controls)
                self._added = set(self._inner.get_added_tokens_decoder())

    def ids(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a part, control tokens recognised."""
        if begins or self._inner is None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        encoding = self._inner.encode(text, add_special_tokens=False)
        at = next((i for i, token in enumerate(encoding.ids) if token in self._added), None)
        if at is None:
            return encoding.ids
        # An added token splits a string: what is behind it may begin another.
        return encoding.ids[:at] + self.ids(text[encoding.offsets[at][0] :], begins=True)

    def plain_ids(self, texts: Sequence[str], *, begins: bool) -> list[list[int]]:
        """Ids of parts in which a control token's name is plain text."""
        rows = self._encode_plain(texts, begins=begins)
        return [
            row if self._forbidden.isdisjoint(row) else self._encode_apart(text, begins=begins)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _encode_plain(self, texts: Sequence[str], *, begins: bool) -> list[list[int]]:
        plain = self._plain[begins]
        if plain is None:
            return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return [encoding.ids for encoding in plain.encode_batch(list(texts), add_special_tokens=False)]

    def _encode_apart(self, text: str, *, begins: bool) -> list[int]:
        """Ids of a text in which the vocabulary itself has a control token's name as a word: cut in two."""
        names = "|".join(re.escape(name) for name in sorted(self._controls, key=len, reverse=True))
        cut = re.sub(names, lambda name: f"{name[0][0]}\0{name[0][1:]}", text).split("\0")
        rows = [self._encode_plain([part], begins=begins and n == 0)[0] for n, part in enumerate(cut)]
        return [token for row in rows for token in row if token not in self._forbidden]

    def begins_after(self, before: str) -> bool:
        """Whether the tokenizer treats text after `before` as the beginning of a string.

        Some do so after a special token.
        """
        return self.ids(f"{before}a", begins=True) == self.ids(before, begins=True) + self.ids(
            "a", begins=True
        )


def _tokenizer(written: Mapping[str, Any]) -> Tokenizer:
    # A tokenizer.json may bring limits of its own, which calls of a tokenizer of transformers replace.
    return Tokenizer.from_str(json.dumps({**written, "truncation": None, "padding": None}))


def _plain_tokenizer(written: Mapping[str, Any], controls: Collection[str]) -> Tokenizer:
    """A tokenizer that reads the names of control tokens as text: it skips all that are marked special."""
    marked = [
        token | {"special": token["special"] or token["content"] in controls}
        for token in written["added_tokens"]
    ]
    plain = _tokenizer({**written, "added_tokens": marked})
    plain.encode_special_tokens = True
    return plain


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
