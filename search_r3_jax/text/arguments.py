"""Arguments of a call that embeds texts, checked before the work."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from search_r3_jax.errors import UserError
from search_r3_jax.precision import PRECISIONS, Precision
from search_r3_jax.text.prompts import Mode

Kind = Literal["query", "document"]


def check_arguments(
    kind: Kind,
    mode: Mode,
    dimension: int,
    truncate_dim: int | None,
    precision: Precision,
    *,
    max_think_tokens: int | None = None,
) -> None:
    """Raise UserError for an argument that cannot be, or that goes with none of the others."""
    if kind not in ("query", "document"):
        raise UserError(f"kind: {kind!r} is neither 'query' nor 'document'")
    if mode not in ("direct", "reason"):
        raise UserError(f"mode: {mode!r} is neither 'direct' nor 'reason'")
    if kind == "document" and mode == "reason":
        raise UserError("mode: documents are embedded directly; give mode 'direct', or kind 'query'")
    check_whole_numbers(truncate_dim=(truncate_dim, 1), max_think_tokens=(max_think_tokens, 0))
    if truncate_dim is not None and truncate_dim > dimension:
        raise UserError(f"truncate_dim: {truncate_dim}: the model has {dimension} dimensions; give fewer")
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r}: give one of {', '.join(PRECISIONS)}")
    if mode == "direct" and max_think_tokens is not None:
        raise UserError("max_think_tokens: nothing is thought in mode 'direct'; give mode 'reason'")


def check_whole_numbers(**arguments: tuple[Any, int]) -> None:
    """Raise UserError unless each argument, given with its least value, is None or a whole number."""
    for name, (value, least) in arguments.items():
        # bool is a kind of int in Python.
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise UserError(f"{name}: {value!r}: give a whole number, {least} or more")
