"""Typed values of a `config.json`: a wrong one is an error that names the field."""

from __future__ import annotations

import math
from typing import Any

from search_r3_jax.errors import UserError

MISSING: Any = object()
"""In place of a default: the field must be there."""


def count(fields: dict[str, Any], name: str, where: str, default: int = MISSING) -> int:
    """A whole number from 1 on; raises KeyError where it is missing without a default, UserError for
    another value, null included."""
    value = _value(fields, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {name}: {value!r} is no positive whole number; download the file again")
    return value


def number(fields: dict[str, Any], name: str, where: str, default: float = MISSING) -> float:
    """A finite number above 0; raises as `count` does."""
    value = _value(fields, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name}: {value!r} is no positive number; download the file again")
    return float(value)


def switch(fields: dict[str, Any], name: str, where: str, default: bool) -> bool:
    """True or false; raises as `count` does."""
    value = _value(fields, name, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name}: {value!r} is neither true nor false; download the file again")
    return value


def _value(fields: dict[str, Any], name: str, default: Any) -> Any:
    return fields[name] if default is MISSING else fields.get(name, default)
