"""Reader of the result files of `eval` and `budget`, with checks of every field that is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.metrics import METRICS
from search_r3_jax.evaluation.report import FORMAT_VERSION

COSTS = ("valid_rate", "reply_tokens", "queries_per_second", "milliseconds_per_query")
ENDS = ("low", "high")


@dataclass(frozen=True, kw_only=True)
class DataKey:
    """Identity of the searched data: results with equal keys can be compared query by query."""

    name: str
    split: str
    documents: int
    documents_sha256: str
    queries_sha256: str
    query_ids: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One mode of one result file of `eval`.

    Attributes:
        system: name of the model; for a decoder with mode, checkpoint and limit of thinking.
        of_query: query id → metrics, in the order of the file.
        costs: the values of `COSTS`.
        controls: controls of reasoning, as in the file; empty if the file has none.
        step, parameter_hash: of the model; None of a baseline, and the step of a model that is no run.
    """

    file: Path
    system: str
    mode: str
    searched: DataKey
    of_query: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, float]
    controls: Mapping[str, Mapping[str, Any]]
    step: int | None = None
    parameter_hash: str | None = None

    def values(self, metric: str, query_ids: Iterable[str] | None = None) -> np.ndarray:
        """A metric of each query [Q], in the order of the file or of `query_ids`."""
        return np.array(
            [self.of_query[query_id][metric] for query_id in query_ids or self.of_query], np.float64
        )


def read_result_file(path: Path, *, wrote: str) -> dict[str, Any]:
    """The content of a result file of the commands `wrote`; raises UserError naming file and field."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a file that {wrote} wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); give a file that {wrote} wrote") from None
    if (
        not isinstance(content, dict)
        or content.get("format_version") != FORMAT_VERSION
        or not isinstance(content.get("data"), dict)
    ):
        raise UserError(f"{path}: format_version: is no result of {wrote} of this version; evaluate again")
    return content


def read_results(files: Sequence[Path]) -> tuple[list[EvalResult], list[dict[str, Any]]]:
    """The results of `eval`, one per mode, and the contents of files of `budget`.

    Raises UserError for any other file, or one that is named twice.
    """
    results: list[EvalResult] = []
    budgets: list[dict[str, Any]] = []
    for at, file in enumerate(files):
        if file.resolve() in [earlier.resolve() for earlier in files[:at]]:
            raise UserError(f"--eval: {file}: is there twice; name each file once")
        content = read_result_file(file, wrote="`search-r3 eval --out` or `search-r3 budget --out`")
        _check_data(file, content)
        if "modes" in content:
            results += _eval_results(file, content)
        elif "budgets" in content:
            _check_budget(file, content)
            budgets.append(content)
        else:
            raise UserError(
                f"{file}: modes: missing, and so is budgets; give a file of `search-r3 eval --out` or "
                "`search-r3 budget --out`"
            )
    return results, budgets


def _check_data(file: Path, content: Mapping[str, Any]) -> None:
    """Check the fields of a title."""
    _value_at(file, content, "model", kind=str)
    for name in ("name", "split"):
        _value_at(file, content, "data", name, kind=str)
    for name in ("documents", "queries"):
        _value_at(file, content, "data", name, kind=int)
    cut = content["data"].setdefault("cut", None)
    if cut is not None:
        _value_at(file, content, "data", "cut", "whole", kind=int)
    if content["data"].get("query_cut") is not None:
        _value_at(file, content, "data", "query_cut", "whole", kind=int)


def _eval_results(file: Path, content: Mapping[str, Any]) -> list[EvalResult]:
    data, system = content["data"], content.get("system")
    system = system if isinstance(system, dict) else {}
    results = []
    for mode in _value_at(file, content, "modes", kind=dict):
        per_query = _value_at(file, content, "modes", mode, "per_query", kind=dict)
        if not per_query:
            raise UserError(f"{file}: modes.{mode}.per_query: has no query; evaluate again")
        of_query = {
            query_id: {
                metric: _number(file, content, "modes", mode, "per_query", query_id, metric)
                for metric in METRICS
            }
            for query_id in per_query
        }
        controls = content["modes"][mode].get("controls", {})
        if controls:
            _check_controls(file, content, mode)
        key = DataKey(
            name=data["name"],
            split=data["split"],
            documents=data["documents"],
            documents_sha256=str(data.get("documents_sha256")),
            queries_sha256=str(data.get("queries_sha256")),
            query_ids=frozenset(of_query),
        )
        costs = {name: _number(file, content, "modes", mode, name) for name in COSTS}
        name = _system_name(content["model"], system, mode)
        results.append(
            EvalResult(
                file=file,
                system=name,
                mode=mode,
                searched=key,
                of_query=of_query,
                costs=costs,
                controls=controls,
                step=system.get("step"),
                parameter_hash=system.get("parameter_hash"),
            )
        )
    return results


def _system_name(model: str, system: Mapping[str, Any], mode: str) -> str:
    if system.get("kind") != "decoder":
        return model
    parts = [model, {"reason": "reasoned"}.get(mode, mode)]
    if system.get("step") is not None:
        parts.append(f"step {system['step']}")
    if mode == "reason" and "max_think_tokens" in system:
        parts.append(f"at most {system['max_think_tokens']} tokens")
    return ", ".join(parts)


def _check_controls(file: Path, content: Mapping[str, Any], mode: str) -> None:
    for name in _value_at(file, content, "modes", mode, "controls", kind=dict):
        where = ("modes", mode, "controls", name)
        for field in ("ndcg@10", "reply_tokens"):
            _number(file, content, *where, field)
        for end in ENDS:
            _number(file, content, *where, "ndcg@10_interval", end)
        for part in ("mean", *ENDS):
            _number(file, content, *where, "own_minus_this", part)


def _check_budget(file: Path, content: Mapping[str, Any]) -> None:
    points = _value_at(file, content, "budgets", kind=list)
    if not points:
        raise UserError(f"{file}: budgets: is empty; measure again with some --budgets")
    for where in (("direct",), *(("budgets", at) for at in range(len(points)))):
        for field in (*METRICS, *COSTS):
            _number(file, content, *where, field)
        for end in ENDS:
            _number(file, content, *where, "ndcg@10_interval", end)
    for at in range(len(points)):
        _value_at(file, content, "budgets", at, "max_think_tokens", kind=int)
        for part in ("mean", *ENDS):
            _number(file, content, "budgets", at, "over_direct", part)


def _number(file: Path, content: Any, *keys: str | int) -> float:
    value = _value_at(file, content, *keys, kind=(int, float))
    if not math.isfinite(value):
        raise UserError(f"{file}: {_dotted(keys)}: {value} is not finite; evaluate again")
    return float(value)


def _value_at(file: Path, content: Any, *keys: str | int, kind: type | tuple[type, ...]) -> Any:
    """The value at a path of keys; raises UserError when it is missing or of another type."""
    value = content
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{file}: {_dotted(keys)}: missing; evaluate again") from None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{file}: {_dotted(keys)}: of the wrong kind; evaluate again")
    return value


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(map(str, keys))
