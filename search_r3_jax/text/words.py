"""Words of prose and of source code."""

from __future__ import annotations

import re

from search_r3_jax.config import EMBED_TOKEN

# A camel-case hump with its lower-case tail, a run of capitals up to the next hump, a run of digits.
IDENTIFIER_PART = re.compile(r"[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z][^\W\d_A-Z]*|\d+")
WORD = re.compile(r"\w+")


def split_identifiers(text: str) -> list[str]:
    """Lower-cased words in order; snake_case and camelCase fall into their parts, digits stand apart."""
    return [part.lower() for part in IDENTIFIER_PART.findall(text)]


def plain_words(text: str) -> list[str]:
    """Lower-cased words in order; identifiers stay whole."""
    return WORD.findall(text.lower())


def as_read(text: str) -> str:
    """A text as every prompt holds it: without the embed token's name, and without space around it."""
    return text.strip().replace(EMBED_TOKEN, "")
