"""The page of `report`: runs and results as one HTML file without scripts or external resources."""

from __future__ import annotations

import base64
import contextlib
import datetime
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from search_r3_jax import __version__
from search_r3_jax.console import printable
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.curves import SMOOTHED_STEPS
from search_r3_jax.evaluation.page_tables import Table, budget_table, index_table, result_tables, run_table
from search_r3_jax.evaluation.page_template import PAGE
from search_r3_jax.evaluation.pictures import (
    INDEX_PANELS,
    MOST_POINTS,
    PANELS,
    Picture,
    draw_budget_curve,
    draw_panels,
)
from search_r3_jax.evaluation.result_files import EvalResult, read_results
from search_r3_jax.evaluation.run_files import Found, RunFiles, Sample, read_runs
from search_r3_jax.extras import require
from search_r3_jax.files import target_of
from search_r3_jax.outputs import check_output_folder, check_outputs, write_all, write_result

STAGES = {"sft": "Stage 1", "rl": "Stage 2"}
# Per run: enough to see its reasoning and how it changed.
SHOWN_ROLLOUTS, SHOWN_SEARCHES = 8, 4
MOST_CHARACTERS = 2_000
# What numbers and pictures of the page depend on, beside this package.
LIBRARIES = ("jax", "numpy", "matplotlib")
CURVES_NOTE = (
    f"Pale: each step; strong: the mean of {SMOOTHED_STEPS} steps; dots: measured now and then. "
    f"Of more than {MOST_POINTS} steps, {MOST_POINTS} means take their place. Steps whose value is not "
    "finite are left out."
)


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """A search as the page shows it; the first entry of `head` is its score."""

    head: Sequence[str]
    query: str
    text: str
    top: Sequence[Found]


@dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Searches under one heading."""

    title: str
    samples: Sequence[ShownSample]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: pictures, then tables, then searches."""

    anchor: str
    title: str
    note: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[SampleGroup] = ()


def write_report(
    runs: Sequence[Path], results: Sequence[Path], out: Path, pictures: Path | None = None
) -> None:
    """Write the page about runs and result files, and optionally its pictures as PNG files.

    Raises UserError, with nothing written, for what is neither a run nor a result.
    """
    if not runs and not results:
        raise UserError(
            "report: nothing to report; name run directories, or files of eval and budget with --eval"
        )
    check_outputs(("--out", out), inputs=[*runs, *results])
    check_output_folder("--pictures", pictures)
    run_files, (evaluations, budgets) = read_runs(runs), read_results(results)
    if run_files or budgets:
        require("report", "eval", "matplotlib")
    sections = [
        section
        for section in _sections(run_files, evaluations, budgets)
        if section.pictures or section.tables or section.samples
    ]
    names = [run.name for run in run_files] or [file.stem for file in results]
    page = _page(names, _command(runs, results, out, pictures), sections)
    contents = {("--out", out): page.encode("utf-8")}
    if pictures is not None:
        with contextlib.suppress(OSError):
            target_of(pictures).mkdir(exist_ok=True)
        for picture in (picture for section in sections for picture in section.pictures):
            contents["--pictures", pictures / f"{picture.name}.png"] = picture.png
    write_all(*(partial(_write, *place, content) for place, content in contents.items()))


def _write(flag: str, file: Path, content: bytes) -> None:
    write_result(flag, file, lambda path: path.write_bytes(content))


def _sections(
    runs: Sequence[RunFiles], results: Sequence[EvalResult], budgets: Sequence[dict[str, Any]]
) -> list[Section]:
    sections = []
    if results:
        sections.append(Section(anchor="results", title="Results", tables=result_tables(results)))
    if budgets:
        curves = [
            draw_budget_curve(f"budget-{number}", content) for number, content in enumerate(budgets, start=1)
        ]
        tables = [budget_table(content) for content in budgets]
        sections.append(Section(anchor="budget", title="Think budget", pictures=curves, tables=tables))
    for stage, title in STAGES.items():
        of_stage = [run for run in runs if run.stage == stage]
        if not of_stage:
            continue
        drawn = draw_panels(stage, of_stage, PANELS[stage])
        note = CURVES_NOTE if drawn else "No step has been taken yet."
        sections.append(
            Section(anchor=stage, title=title, note=note, pictures=drawn, tables=[run_table(stage, of_stage)])
        )
        if stage == "rl" and any(run.metrics for run in of_stage):
            drawn = draw_panels("index", of_stage, INDEX_PANELS)
            sections.append(
                Section(anchor="index", title="Moving index", pictures=drawn, tables=[index_table(of_stage)])
            )
    groups = [*map(_rollouts, runs), *map(_searches, runs)]
    groups = [group for group in groups if group.samples]
    sections.append(Section(anchor="samples", title="What was written", samples=groups))
    return sections


def _rollouts(run: RunFiles) -> SampleGroup:
    """Rollouts, evenly spaced over the run."""
    rollouts = [sample for sample in run.samples if not sample.origin]
    return SampleGroup(
        title=f"{run.name}: rollouts",
        samples=[_shown(sample) for sample in _spread(rollouts, SHOWN_ROLLOUTS)],
    )


def _searches(run: RunFiles) -> SampleGroup:
    """The first reasoned searches on development queries, each at the first and the last evaluation."""
    of_query: dict[tuple[str, ...], list[Sample]] = {}
    for sample in run.samples:
        if sample.origin and sample.text:
            of_query.setdefault((*sample.origin, sample.query), []).append(sample)
    ends = [end for searches in list(of_query.values())[:SHOWN_SEARCHES] for end in _spread(searches, 2)]
    return SampleGroup(
        title=f"{run.name}: development queries, first and last evaluation",
        samples=[_shown(sample) for sample in ends],
    )


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced, including the first and the last."""
    at = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[i] for i in at]


def _shown(sample: Sample) -> ShownSample:
    if sample.origin:
        name, mode = sample.origin
        when = f"after {sample.step + 1} steps" if sample.step >= 0 else "before training"
        head = [f"nDCG@10 {sample.score:.3f}", when, name, {"reason": "reasoned"}.get(mode, mode)]
    else:
        valid = "valid" if sample.valid else "no embed token of its own"
        head = [f"reward {sample.score:.3f}", f"step {sample.step}", f"{sample.tokens} tokens", valid]
    return ShownSample(head=head, query=_cut(sample.query), text=_cut(sample.text.strip()), top=sample.top)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text)} characters)"


def _command(runs: Sequence[Path], results: Sequence[Path], out: Path, pictures: Path | None) -> str:
    """The command that writes this page, wherever its files lie: of absolute paths the last two parts."""
    words = ["search-r3", "report", *map(_portable, runs)]
    if results:
        words += ["--eval", *map(_portable, results)]
    words += ["--out", _portable(out)]
    if pictures is not None:
        words += ["--pictures", _portable(pictures)]
    return shlex.join(words)


def _portable(path: Path) -> str:
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(Path(*path.parts[-2:]) if path.is_absolute() and len(path.parts) > 2 else path)


def _versions() -> str:
    """Of this package, Python and the libraries behind the page."""
    versions = [f"search_r3_jax {__version__}", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)


def _page(names: Sequence[str], command: str, sections: Sequence[Section]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_finalized
    )
    environment.filters["data_uri"] = _data_uri
    title = f"search-r3: {', '.join(names)}"
    return environment.from_string(PAGE).render(
        title=title,
        sections=sections,
        command=command,
        versions=_versions(),
        # The day alone: the same files give the same page.
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _finalized(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _data_uri(svg: bytes) -> str:
    # As an image it cannot run scripts or load anything, and its ids cannot collide with others.
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
