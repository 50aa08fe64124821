"""Reader of a run directory for people: settings, scalars of each step, sampled searches."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.files import complete_lines
from search_r3_jax.hub.checkpoint_reader import read_run

STAGES = ("sft", "rl")
# Of a document that a search found: enough to see why.
DOCUMENT_CHARACTERS = 160
DAMAGED = "the file was damaged or edited; remove the line, or leave the run out"


class Found(NamedTuple):
    """A document that a search found; runs of older versions did not record its text."""

    document: str
    relevant: bool
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One search of `samples.jsonl`: a rollout of stage 2, or a search on a development query.

    A rollout has a `reward`.

    Attributes:
        step: of the rollout; of a search, the step after which it was made (−1 is before training).
        text: what the model wrote; empty in direct mode.
        score: the reward of a rollout, nDCG@10 of a search.
        top: the documents that it found, the best first.
        origin: set and mode of a search; empty for a rollout.
        valid, tokens: of a rollout's reply; None of a search.
    """

    step: int
    query: str
    text: str
    score: float
    top: tuple[Found, ...]
    origin: tuple[str, ...] = ()
    valid: bool | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Content of one run directory.

    Attributes:
        name: end of its path, long enough to differ from the other runs.
        stage: `sft` or `rl`.
        run_json: the whole of `config.json`; `config` are its settings.
        written: the day of its last step in UTC; empty before one.
        metrics: the scalars of each step taken, `step` among them.
        before: scalars of the development queries before the first step.
    """

    name: str
    stage: str
    config: RunConfig
    run_json: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    before: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    written: str = ""

    def series(self, scalar: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps done [N], values [N]) of a scalar wherever it was logged and is finite."""
        points = [(line["step"] + 1, line[scalar]) for line in self.metrics if scalar in line]
        if scalar in self.before:
            points.insert(0, (0, self.before[scalar]))
        steps_values = np.array(points, np.float64).reshape(-1, 2)
        steps_values = steps_values[np.isfinite(steps_values[:, 1])]
        return steps_values[:, 0], steps_values[:, 1]

    def recent(self, scalar: str) -> float | None:
        """The mean of a scalar over the last quarter of the steps; None where it was not logged there."""
        lines = self.metrics[-max(1, len(self.metrics) // 4) :]
        values = [line[scalar] for line in lines if scalar in line and math.isfinite(line[scalar])]
        return float(np.mean(values)) if values else None


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The runs in the order given.

    Raises UserError for a folder that is no run or is named twice, or a file that cannot be read.
    """
    paths = [folder.resolve() for folder in folders]
    for at, (folder, path) in enumerate(zip(folders, paths, strict=True)):
        if path in paths[:at]:
            raise UserError(f"{folder}: is there twice; name each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, distinct_names(paths), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    longest = max((len(path.parts) for path in paths), default=0)
    for parts in range(1, longest):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(folder: Path, name: str) -> RunFiles:
    config, run_json = read_run(folder)
    stage = run_json.get("stage")
    if stage not in STAGES:
        raise UserError(
            f"{folder / 'config.json'}: stage: is none of {', '.join(STAGES)}; give a folder that sft or rl "
            "wrote to"
        )
    return RunFiles(
        name=name,
        stage=stage,
        config=config,
        run_json=run_json,
        metrics=[_scalars(line, where) for line, where in _objects(folder / "metrics.jsonl")],
        before=_before(folder / "eval" / "dev_000000.json"),
        samples=[_sample(line, where) for line, where in _objects(folder / "samples.jsonl")],
        written=_day(folder / "metrics.jsonl"),
    )


def shown_text(text: str) -> str:
    """The beginning of a document, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= DOCUMENT_CHARACTERS else f"{line[: DOCUMENT_CHARACTERS - 1]}…"


def _day(file: Path) -> str:
    if not file.is_file():
        return ""
    return datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).date().isoformat()


def _objects(file: Path) -> list[tuple[dict[str, Any], str]]:
    """Each line of a .jsonl file with its place; an incomplete last line is skipped."""
    objects = []
    for number, text in enumerate(complete_lines(file), start=1):
        where = f"{file}: line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON ({error}); {DAMAGED}") from None
        if not isinstance(line, dict):
            raise UserError(f"{where}: is no JSON object; {DAMAGED}")
        _need(_is_count, "number of a step", line, "step", where)
        objects.append((line, where))
    return objects


def _scalars(line: Mapping[str, Any], where: str) -> dict[str, float]:
    for name in line:
        _need(_is_number, "number", line, name, where)
    return dict(line)


def _sample(line: Mapping[str, Any], where: str) -> Sample:
    rollout = "reward" in line
    text, score = ("reply", "reward") if rollout else ("reasoning", "ndcg@10")
    for name in ("query", text) if rollout else ("query", text, "set", "mode"):
        _need(_is_text, "string", line, name, where)
    _need(_is_number, "number", line, score, where)
    _need(_is_ranking, "list of documents", line, "top", where)
    if rollout:
        _need(_is_count, "number", line, "tokens", where)
    return Sample(
        step=line["step"],
        query=line["query"],
        text=line[text],
        score=line[score],
        top=tuple(
            Found(each["document"], each.get("relevant") is True, each.get("text", ""))
            for each in line["top"]
        ),
        origin=() if rollout else (line["set"], line["mode"]),
        valid=line.get("valid") is True if rollout else None,
        tokens=line["tokens"] if rollout else None,
    )


def _before(file: Path) -> dict[str, float]:
    """Scalars of the evaluation before the first step, named as in `metrics.jsonl`."""
    if not file.is_file():
        return {}
    try:
        sets = json.loads(file.read_text(encoding="utf-8"))["results"]
        scalars: dict[str, list[float]] = {}
        for modes in sets.values():
            for mode, values in modes.items():
                for name, value in values.items():
                    if _is_number(value):
                        scalars.setdefault(f"dev_{mode}_{name}", []).append(value)
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file}: is no evaluation of a run ({error}); remove the file, or leave the run out"
        ) from None
    return {name: float(np.mean(values)) for name, values in scalars.items()}


def _need(check: Callable[[Any], bool], kind: str, line: Mapping[str, Any], name: str, where: str) -> None:
    if not check(line.get(name)):
        raise UserError(f"{where}: {name}: missing or no {kind}; {DAMAGED}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_ranking(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and _is_text(each.get("document")) and _is_text(each.get("text", ""))
        for each in value
    )
