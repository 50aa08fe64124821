"""The other line of JAX computes the same: runs, exports and plans of one line, gone on with and made again
by the other.

`SEARCH_R3_OTHER_PYTHON` names a Python of the other line with what the package needs; `.ci/run` makes one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.command_folder import SOURCES, Place, back_to

OTHER = os.environ.get("SEARCH_R3_OTHER_PYTHON", "")
LINES = {"this": sys.executable, "other": OTHER}
STEPS = 8
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason="SEARCH_R3_OTHER_PYTHON names no Python of the other line of JAX"),
]


def on(line: str, command: list[str]) -> list[str]:
    """A command of `Place` as the Python of a line runs it."""
    return [LINES[line], *command[1:]]


def check(lines: list[dict[str, Any]], whole: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    assert [line["step"] for line in lines] == list(range(STEPS))
    for ours, theirs in zip(lines, whole, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (ours["step"], name)


@pytest.fixture(autouse=True)
def _flags_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA ends at a flag that it does not know: only those that both lines have."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture
def place(tiny_folders: dict[str, Path], tmp_path: Path):
    """A folder with a tiny model and a data set."""
    made = Place(tmp_path, tiny_folders["llama"])
    yield made
    made.close()


def test_it_is_another_line() -> None:
    program = "import jax, json, sys; print(json.dumps([jax.__version__, sys.version_info[:2]]))"
    version, python = json.loads(subprocess.check_output([OTHER, "-c", program]))
    assert version.split(".")[:2] != jax.__version__.split(".")[:2]
    assert (python >= [3, 12]) != (sys.version_info >= (3, 12))


@pytest.mark.parametrize(
    ("first", "second"), [("this", "other"), pytest.param("other", "this", marks=pytest.mark.exhaustive)]
)
def test_stage_1_goes_on_on_the_other_line_and_exports_the_same(
    place: Place, tmp_path: Path, first: str, second: str
) -> None:
    run = tmp_path / "run"
    settings = {"sft__steps": STEPS, "sft__keep": 9, "sft__save_every": 2, "lora__dropout": 0.1}
    place.finish(on(first, place.command("sft", "run", **settings)))
    whole = place.lines("run")
    back_to(run, 4)
    said = place.finish(on(second, place.command("sft", "run", **settings)))
    assert "going on from step 4" in said
    check(place.lines("run"), whole, ("loss", "infonce", "triplet", "language", "kl", "gradient_norm"))
    # One checkpoint, exported by both: adapters are merged into the same weights.
    exports = {}
    for line in LINES:
        out = tmp_path / line
        command = [*place.command("export", "run")[:4], "--run", str(run), "--out", str(out)]
        place.finish(on(line, command))
        exports[line] = {file.name: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    assert any(name.endswith(".safetensors") for name in exports["this"])
    assert exports["this"].keys() == exports["other"].keys()
    assert [name for name in exports["this"] if exports["this"][name] != exports["other"][name]] == []


def test_stage_2_swaps_its_index_on_the_other_line_and_goes_on_here(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"rl__steps": STEPS, "rl__keep": 9, "rl__save_every": 2, "index__max_index_age_steps": 3}
    place.finish(on("other", place.command("rl", "run", **settings)))
    whole = place.lines("run")
    # It waited for an index that its own indexer made of a checkpoint.
    assert len({line["index_step"] for line in whole}) > 1
    back_to(run, 4)
    said = place.finish(on("this", place.command("rl", "run", **settings)))
    assert "going on from step 4" in said
    check(place.lines("run"), whole, ("index_step", "loss", "reward", "kl", "infonce"))


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-1.5B/v5e-16/encode",
        pytest.param("Qwen2.5-7B/v6e-16/encode", marks=pytest.mark.exhaustive),
        pytest.param("Qwen3-8B/v5p-16/encode", marks=pytest.mark.exhaustive),
    ],
)
def test_its_compiler_plans_the_same(tmp_path: Path, name: str) -> None:
    plans = SOURCES / "launch/plans"
    kept = json.loads((plans / f"{name}.json").read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "search-r3").write_text(f'#!/bin/sh\nexec {OTHER} -m search_r3_jax "$@"\n')
    (tools / "search-r3").chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    # Of this line's compiler, which JAX names to its children.
    environment.pop("TPU_LIBRARY_PATH", None)
    done = subprocess.run(
        [SOURCES / "launch/plans.sh", "--out", tmp_path / "plans", name],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / f"plans/{name}.json").read_text())
    assert made["fits"]
    assert made["arguments_bytes"] == pytest.approx(kept["arguments_bytes"], rel=0.02)
    assert made["shardings"] == kept["shardings"]
    assert sum(made["collective_bytes"].values()) <= 1.02 * sum(kept["collective_bytes"].values())
    assert made["executed_flops"] <= 1.02 * kept["executed_flops"]
