"""Texts as callers have them, as a list of strings: lists, generators, NumPy arrays, pandas columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from search_r3_jax.errors import UserError


def text_list(texts: Iterable[Any]) -> list[str]:
    """The texts; raises UserError for the first thing that is no text, by its number from 1 on.

    None, NaN and numbers are no texts: turned into strings they would be embedded as words. Half of a
    surrogate pair is no character, and no tokenizer can read it.
    """
    # A table gives the names of its columns, a set an order by chance.
    one_column = getattr(texts, "ndim", 1) == 1
    if isinstance(texts, bytes | Mapping | set | frozenset) or not (
        isinstance(texts, Iterable) and one_column
    ):
        raise UserError(f"texts: {type(texts).__name__}: give a string, or a list or one column of strings")
    checked = list[str]()
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UserError(
                f"text {number}: {text!r:.60}: is {_kind(text)}, no text; leave it out or give a string"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UserError(
                f"text {number}: {half!a} at character {error.start + 1}: half of a surrogate pair, no "
                "character; decode the text as UTF-8"
            ) from None
        # NumPy's strings are a kind of their own.
        checked.append(str(text))
    return checked


def _kind(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    return f"of type {type(value).__name__}"
