"""Rotary positions in a `config.json`: `rope_parameters`, and the older `rope_scaling` and `rope_theta`."""

from __future__ import annotations

import math
from typing import Any

from search_r3_jax.config import RopeScaling
from search_r3_jax.errors import UserError
from search_r3_jax.models.config_values import count, number

DEFAULT_THETA = 10_000.0
ROPE_FIELDS = {
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
"""The fields of a `config.json` that `read_rope` reads."""
_NAMED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FIELDS_OF: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    },
}


def read_rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """θ and the scaling; raises UserError naming an unsupported field.

    As in `transformers`: a `rope_scaling` that is not empty replaces `rope_parameters` as a whole, the
    block's θ goes before `rope_theta` beside it, and an `original_max_position_embeddings` beside it goes
    before the block's. Null counts as given.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(name), dict | None):
            raise UserError(f"{where}: {name}: {fields[name]!r} is no JSON object; download the file again")
    block = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given: dict[str, Any] = fields.get(block) or {}
    place = f"{where}: {block}"
    for values, prefix in ((fields, f"{where}: "), (given, f"{place}.")):
        if values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UserError(
                f"{prefix}partial_rotary_factor: {values['partial_rotary_factor']!r} is not supported; only "
                "1.0 is"
            )
    if "rope_theta" in given:
        theta = number(given, "rope_theta", place)
    else:
        theta = number(fields, "rope_theta", where, DEFAULT_THETA)
    kind = given["rope_type"] if "rope_type" in given else given.get("type", "default")
    if kind not in _FIELDS_OF:
        raise UserError(f"{place}.rope_type: {kind!r} is not supported; use one of {', '.join(_FIELDS_OF)}")
    unknown = sorted(
        name for name, value in given.items() if name not in _NAMED | _FIELDS_OF[kind] and value is not None
    )
    if unknown:
        raise UserError(
            f"{place}.{unknown[0]}: not known for rope_type {kind!r}; if it changes nothing, remove it"
        )
    return theta, _scaling(kind, given, fields, theta, where, place)


def _scaling(
    kind: str, given: dict[str, Any], fields: dict[str, Any], theta: float, where: str, place: str
) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = number(given, "factor", place)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = _original_positions(given, fields, where, place)
    if kind == "llama3":
        low, high = number(given, "low_freq_factor", place), number(given, "high_freq_factor", place)
        if low >= high:
            raise UserError(f"{place}.high_freq_factor: {high} must be greater than low_freq_factor, {low}")
        return RopeScaling(
            kind="llama3", factor=factor, original_positions=original, low_frequency=low, high_frequency=high
        )
    if theta == 1:
        raise UserError(f"{place}.rope_theta: 1 leaves yarn no frequencies to choose from; download it again")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=_number_or(given, "beta_fast", place, 32.0),
        beta_slow=_number_or(given, "beta_slow", place, 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_yarn_attention_factor(given, factor, place),
    )


def _original_positions(given: dict[str, Any], fields: dict[str, Any], where: str, place: str) -> int:
    name = "original_max_position_embeddings"
    default = count(fields, "max_position_embeddings", where)
    # Read even where the one beside the block replaces it: null is refused in both places.
    inside = count(given, name, place, default)
    return count(fields, name, where, inside)


def _number_or(given: dict[str, Any], name: str, place: str, default: float) -> float:
    return default if given.get(name) is None else number(given, name, place)


def _yarn_attention_factor(given: dict[str, Any], factor: float, place: str) -> float:
    """√(1/t) of YaRN (arXiv 2309.00071, equation 15), as given, or in DeepSeek's form with two weights."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return number(given, "attention_factor", place)
    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(number(given, "mscale", place)) / grown(number(given, "mscale_all_dim", place))
    return grown(1.0)
