"""Printing and writing of plans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from search_r3_jax.config import MeshConfig
from search_r3_jax.console import TextConsole, printable
from search_r3_jax.outputs import write_text_result
from search_r3_jax.planning.plan import Plan

_GIB = 2.0**30


def print_plan(plan: Plan, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Print a plan as text or JSON."""
    if as_json:
        print(json.dumps(dataclasses.asdict(plan), indent=1), file=stream)
        return
    mesh = (
        ", " + " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
        if plan.chips > 1
        else ""
    )
    ratio = (
        ""
        if plan.collective_ratio is None
        else f", {plan.collective_ratio:.2f} × the least that sharding costs"
    )
    slices = f"{plan.slices} × " if plan.slices > 1 else ""
    read = "queries" if plan.stage == "search" else "tokens"
    lines = [
        f"{plan.stage} of {plan.model} on {slices}{plan.topology}: {plan.chips} "
        f"chip{'s' if plan.chips > 1 else ''}{mesh}",
        "",
        f"memory a chip      {_gib(plan.hbm_used)} of {_gib(plan.hbm_limit)}, {plan.hbm_spare:.1%} left"
        + ("" if plan.fits else "  ← less than 5 %: it does not fit"),
        *(f"  {kind:<16} {_gib(size)}" for kind, size in plan.hbm.items() if size > 0),
        "",
        f"work a chip        {plan.executed_flops / 1e12:,.1f} TFLOP, {plan.recomputed:.2f} × the model's "
        f"{plan.model_flops / 1e12:,.1f}",
        f"sent by a chip     {_gib(sum(plan.collective_bytes.values()))}{ratio}",
        *(f"  over {axes:<11} {_gib(size)}" for axes, size in plan.collective_bytes.items()),
        *(
            f"    {_gib(each['bytes'])}  {each['runs']:>4} × {each['kind']} of {each['shape']}"
            for each in plan.collectives[:4]
        ),
        "",
        "time at least      "
        + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
        + f": {plan.binds} binds",
        f"at most            {plan.tokens_per_second:,.0f} {read}/s of all chips ({plan.tokens:,} a run), "
        f"MFU {plan.mfu_bound:.0%}",
        f"  peaks            {plan.peaks['flops'] / 1e12:.0f} TFLOP/s, HBM "
        f"{plan.peaks['hbm_bandwidth'] / 1e9:,.0f} GB/s, "
        f"ICI {plan.peaks['ici_bandwidth'] / 1e9:.0f} GB/s a chip ({plan.peaks['source']})",
        f"compiled in        {plan.compile_seconds:.0f} s here",
    ]
    print(printable("\n".join(lines)), file=stream)


def meshes_content(tried: Sequence[tuple[MeshConfig, Plan | None]]) -> list[dict[str, Any]]:
    """Meshes and their plans for JSON."""
    return [
        {"mesh": dataclasses.asdict(mesh), "plan": None if plan is None else dataclasses.asdict(plan)}
        for mesh, plan in tried
    ]


def print_meshes(
    tried: Sequence[tuple[MeshConfig, Plan | None]], *, as_json: bool, stream: TextIO | None = None
) -> None:
    """Print a table of meshes and their plans, the best first."""
    if as_json:
        print(json.dumps(meshes_content(tried), indent=1), file=stream)
        return
    table = Table(
        *("slice", "data", "fsdp", "tensor"),
        "memory",
        "left",
        "sent",
        "binds",
        "tokens/s ≤",
        "MFU ≤",
        box=None,
    )
    for mesh, plan in tried:
        sizes = [str(size) for size in (mesh.slice, mesh.data, mesh.fsdp, mesh.tensor)]
        if plan is None:
            table.add_row(*sizes, "too little")
            continue
        sent = sum(plan.collective_bytes.values())
        spare = f"{plan.hbm_spare:.0%}" if plan.fits else f"{plan.hbm_spare:.0%} !"
        table.add_row(
            *sizes,
            _gib(plan.hbm_used),
            spare,
            _gib(sent),
            plan.binds,
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu_bound:.0%}",
        )
    TextConsole(stream, soft_wrap=False).print(table)


def write_plans(content: Any, file: Path | None) -> None:
    """Write plans as JSON, atomically; nothing without a file."""
    if file is not None:
        write_text_result("--out", file, json.dumps(content, indent=1) + "\n")


def _gib(size: float) -> str:
    return f"{size / _GIB:7.2f} GiB"
