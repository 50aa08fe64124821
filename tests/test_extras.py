"""A package that only some commands need: where it is missing, one line names the extra, before any work."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import search_r3_here
from helpers.report_inputs import eval_record, write_run

from search_r3_jax.errors import UserError
from search_r3_jax.extras import require

PLAN = ["plan", "--config", "smollm2", "--stage", "sft", "--topology", "v5e-16"]
# (module, its package, the extra, the command; DIR is an empty folder, RUN a run, FILE a file)
CALLS = [
    ("libtpu", "plan: libtpu", "plan", PLAN),
    ("matplotlib", "report: matplotlib", "eval", ["report", "RUN", "--out", "DIR/page.html"]),
    ("matplotlib", "curves: matplotlib", "eval", ["curves", "RUN", "--out", "DIR/curves.png"]),
    (
        "matplotlib",
        "budget: matplotlib",
        "eval",
        ["budget", "--model", "m", "--data", "d", "--out", "DIR/b.json", "--picture", "DIR/b.png"],
    ),
    ("bm25s", "eval: bm25s", "eval", ["eval", "--model", "bm25", "--data", "d"]),
    ("bm25s", "eval: bm25s", "eval", ["eval", "--model", "bm25-split", "--data", "d"]),
    ("Stemmer", "eval: PyStemmer", "eval", ["eval", "--model", "bm25", "--data", "d"]),
    (
        "sentence_transformers",
        "eval: sentence-transformers",
        "eval",
        ["eval", "--model", "st:folder", "--data", "d"],
    ),
    ("torch", "eval: torch", "eval", ["eval", "--model", "st:folder", "--data", "d"]),
    ("mteb", "mteb: mteb", "mteb", ["mteb", "--model", "m", "--data", "d", "--out", "DIR/out"]),
    ("torch", "mteb: torch", "mteb", ["mteb", "--model", "m", "--data", "d", "--out", "DIR/out"]),
    ("bm25s", "quickstart: bm25s", "quickstart", ["quickstart", "--out", "DIR/out"]),
    ("gguf", "quickstart: gguf", "quickstart", ["quickstart", "--out", "DIR/out"]),
    ("gguf", "FILE: gguf", "quickstart", ["export", "--model", "FILE", "--out", "DIR/out"]),
    (
        "datasets",
        "data build: datasets",
        "datasets",
        ["data", "build", "--source", "table", "--input", "someone/pairs", "--out", "DIR/out"],
    ),
]


@pytest.mark.parametrize(
    ("module", "told", "extra", "command"), CALLS, ids=[f"{call[3][0]} without {call[0]}" for call in CALLS]
)
def test_a_missing_package_is_one_line_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    told: str,
    extra: str,
    command: list[str],
) -> None:
    write_run(tmp_path / "run", "sft", steps=4)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    places = {"RUN": tmp_path / "run", "FILE": tmp_path / "model.gguf", "DIR": tmp_path / "empty"}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    shown = search_r3_here(*map(placed, command))
    line = f"search-r3: {placed(told)} is not installed; run: pip install 'search_r3_jax[{extra}]'\n"
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", line)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_report_without_pictures_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "result.json").write_text(json.dumps(eval_record({"direct": np.ones(3)}, model="m")))
    shown = search_r3_here(
        "report", "--eval", str(tmp_path / "result.json"), "--out", str(tmp_path / "r.html")
    )
    assert (shown.returncode, shown.stderr) == (0, "")


def test_what_is_installed_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require("test", "eval", "json", "os.path")
    with pytest.raises(UserError, match=r"test: nowhere\.at_all is not installed; run: pip install"):
        require("test", "eval", "json", "nowhere.at_all")
