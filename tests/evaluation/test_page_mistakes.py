"""`search-r3 report` on what cannot be shown: one line that names file and field, and nothing written."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_inputs import budget_record, eval_record, rollout_sample, write_json, write_run

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.page import write_report

METRICS_FILE, SAMPLES_FILE = "run/metrics.jsonl", "run/samples.jsonl"
SAMPLE = json.dumps(rollout_sample(0, np.random.default_rng(0))) + "\n"
# A file, what it holds instead, and what is said.
MISTAKES = {
    "no run": (
        "run/config.json",
        "{}",
        r"run/config\.json: not the config of a run \('config'\); give the folder",
    ),
    "no stage": (
        "run/config.json",
        '{"config": {}, "stage": "x"}',
        r"config\.json: stage: is none of sft, rl; give a folder",
    ),
    "metrics": (
        METRICS_FILE,
        '{"step": 0}\n{"st\n{"step": 2}\n',
        r"metrics\.jsonl: line 2: is not JSON .*; the file was damaged",
    ),
    "deep": (
        METRICS_FILE,
        "[" * 100_000 + "\n",
        r"metrics\.jsonl: line 1: is not JSON .*; the file was damaged",
    ),
    "list": (METRICS_FILE, "[]\n", r"metrics\.jsonl: line 1: is no JSON object; the file was damaged"),
    "no step": (
        METRICS_FILE,
        '{"loss": 1}\n',
        r"metrics\.jsonl: line 1: step: missing or no number of a step; the file",
    ),
    "scalar": (
        METRICS_FILE,
        '{"step": 0, "loss": "x"}\n',
        r"metrics\.jsonl: line 1: loss: missing or no number; the file",
    ),
    "sample": (
        SAMPLES_FILE,
        SAMPLE.replace('"query"', '"qu"'),
        r"samples\.jsonl: line 1: query: missing or no string;",
    ),
    "top": (
        SAMPLES_FILE,
        SAMPLE.replace('"document"', '"d"'),
        r"samples\.jsonl: line 1: top: missing or no list of documents; the",
    ),
    "development": (
        "run/eval/dev_000000.json",
        "[]",
        r"dev_000000\.json: is no evaluation of a run .*; remove the file, or",
    ),
    "no result": (
        "eval.json",
        '{"step": 1}',
        r"eval\.json: format_version: is no result of `search-r3 eval --out` or `search-r3 ",
    ),
    "half a result": (
        "eval.json",
        "{",
        r"eval\.json: is not JSON .*; give a file that `search-r3 eval --out`",
    ),
    "bytes": (
        "eval.json",
        "\udcff\udcfe\0",
        r"eval\.json: is not JSON .*; give a file that `search-r3 eval --out`",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, mistake: str) -> None:
    damaged, content, message = MISTAKES[mistake]
    write_run(tmp_path / "run", "rl", steps=3)
    write_json(tmp_path / "eval.json", eval_record({"direct": np.array([0.5])}, model="m"))
    (tmp_path / damaged).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message) as raised:
        write_report(
            [tmp_path / "run"], [tmp_path / "eval.json"], tmp_path / "report.html", tmp_path / "pictures"
        )
    assert "\n" not in str(raised.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval.json", "run"]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            ("modes", "direct", "per_query", "q0", "map"),
            "x",
            r"modes\.direct\.per_query\.q0\.map: of the wrong kind; evaluate again",
        ),
        (
            ("modes", "direct", "per_query", "q0", "map"),
            float("nan"),
            r"modes\.direct\.per_query\.q0\.map: nan is not finite; evaluate",
        ),
        (("modes", "direct", "per_query"), {}, r"modes\.direct\.per_query: has no query; evaluate again"),
        (
            ("modes", "direct", "per_query", "q0"),
            {},
            r"modes\.direct\.per_query\.q0\.ndcg@10: missing; evaluate again",
        ),
        (("data", "queries"), None, r"data\.queries: of the wrong kind; evaluate again"),
        (("modes",), [], r"modes: of the wrong kind; evaluate again"),
    ],
)
def test_a_result_with_a_wrong_field_is_refused_by_its_name(
    tmp_path: Path, where: tuple[str, ...], value: Any, message: str
) -> None:
    record = part = eval_record({"direct": np.array([0.5])}, model="m")
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(UserError, match=rf"e\.json: {message}"):
        write_report([], [write_json(tmp_path / "e.json", record)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_budget_with_a_wrong_field_is_refused_by_its_name(tmp_path: Path) -> None:
    record = budget_record(np.random.default_rng(0))
    del record["budgets"][2]["over_direct"]["low"]
    with pytest.raises(UserError, match=r"b\.json: budgets\.2\.over_direct\.low: missing; evaluate again"):
        write_report([], [write_json(tmp_path / "b.json", record)], tmp_path / "report.html")


def test_what_is_asked_for_must_make_sense(tmp_path: Path) -> None:
    write_run(tmp_path / "sft", "sft", steps=2)
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match="nothing to report; name run directories"):
        write_report([], [], out)
    with pytest.raises(UserError, match=r"sft: is there twice; name each run once"):
        write_report([tmp_path / "sft", tmp_path / "sft" / ".." / "sft"], [], out)
    file = write_json(tmp_path / "e.json", eval_record({"direct": np.array([0.5])}, model="m"))
    with pytest.raises(UserError, match=r"--eval: .*e\.json: is there twice"):
        write_report([], [file, file], out)
    with pytest.raises(
        UserError, match=r"nowhere\.json: cannot be read \(No such file or directory\); give a file"
    ):
        write_report([], [tmp_path / "nowhere.json"], out)
    with pytest.raises(UserError, match=r"--out: .*no such folder; make it first"):
        write_report([], [file], tmp_path / "nowhere" / "report.html")
    with pytest.raises(UserError, match=r"--pictures: .*e\.json: is a file; name a folder"):
        write_report([tmp_path / "sft"], [], out, file)
    assert not out.exists()


def test_a_full_disk_leaves_the_page_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "sft", "sft", steps=2)
    (tmp_path / "report.html").write_text("before")

    def full(file: Path, content: bytes) -> int:
        with file.open("wb") as opened:
            opened.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"report\.html: cannot be written \(No space left on device\); the result is lost"
    ):
        write_report([tmp_path / "sft"], [], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "sft"]
