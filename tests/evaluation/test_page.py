"""`search-r3 report`: its numbers are those of the files, and hostile texts stay texts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import search_r3_here
from helpers.report_inputs import (
    HOSTILE,
    budget_record,
    eval_record,
    rollout_sample,
    search_sample,
    with_controls,
    write_json,
    write_lines,
    write_run,
)
from helpers.report_page import Page
from helpers.tiny_models import word_collection

from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.evaluation.compare import compare_results, read_result
from search_r3_jax.evaluation.page import write_report
from search_r3_jax.evaluation.report import SAMPLES, run_evaluation
from search_r3_jax.evaluation.settings import EvalSettings


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Of the bootstrap with the same draws, one sample at a time."""
    draws = np.random.default_rng(0).integers(len(values), size=(SAMPLES, len(values)))
    low, high = np.percentile([values[draw].sum() / len(values) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def test_result_tables_are_the_numbers_of_the_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = {name: generator.random((3, 30)) for name in ("cosqa", "scifact")}
    files = []
    for name, (words, direct, reason) in values.items():
        record = eval_record({"direct": words}, model="bm25", kind="bm25", name=name)
        files.append(write_json(tmp_path / f"{name}-bm25.json", record))
        record = eval_record(
            {"direct": direct, "reason": reason}, model="runs/rl", name=name, step=80, max_think_tokens=16
        )
        files.append(write_json(tmp_path / f"{name}-rl.json", with_controls(record)))
    write_report([], files, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.sections == ["results"]
    reasoned = "runs/rl, reasoned, step 80, at most 16 tokens"
    systems = {"bm25": 0, "runs/rl, direct, step 80": 1, reasoned: 2}

    title = "nDCG@10 of every system on every set"
    assert page.tables[title][0] == [
        "nDCG@10",
        "cosqa (test), 500 documents",
        "scifact (test), 500 documents",
    ]
    assert [row[0] for row in page.tables[title][1:]] == list(systems)
    for system, at in systems.items():
        for of_set, cell in zip(values.values(), page.row(title, system), strict=True):
            low, high = percentile_interval(of_set[at])
            assert cell == f"{of_set[at].mean():.4f}|{low:.3f} … {high:.3f}"

    title = "30 queries of scifact (test) over 500 documents"
    costs = ["valid", "tokens/query", "ms/query"]
    assert page.tables[title][0][1:] == [
        "nDCG@10",
        "over the first",
        "recall@10",
        "recall@100",
        "MRR",
        "MAP",
        *costs,
    ]
    words, _, reason = values["scifact"]
    row = page.row(title, reasoned)
    low, high = percentile_interval(reason - words)
    assert row[1] == f"{(reason - words).mean():+.4f}|{low:+.3f} … {high:+.3f}"
    # Each metric of a made-up record is a known part of the first.
    assert [float(cell.split("|")[0]) for cell in row[2:6]] == pytest.approx(
        [reason.mean() / part for part in (2, 3, 4, 5)], abs=5e-5
    )
    assert row[6:] == ["87.5%", "21.5", "47.2"]
    controls = next(
        rows
        for title, rows in page.tables.items()
        if title.startswith("What its own reasoning is worth") and "cosqa" in title
    )
    assert [row[0] for row in controls[1:]] == ["its own", "another query's", "none"]
    own = values["cosqa"][2]
    assert controls[2][1].startswith(f"{0.9 * own.mean():.4f}|")
    assert controls[2][2].startswith(f"{0.1 * own.mean():+.4f}|")


def test_queries_are_paired_by_their_ids_as_compare_pairs_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = (eval_record({"direct": generator.random(30)}, model=name) for name in ("a", "b"))
    queries = second["modes"]["direct"]["per_query"]
    second["modes"]["direct"]["per_query"] = dict(reversed(queries.items()))
    files = [write_json(tmp_path / f"{record['model']}.json", record) for record in (first, second)]
    write_report([], files, tmp_path / "report.html")
    row = Page(tmp_path / "report.html").row("30 queries of words (test) over 500 documents", "b, direct")
    a, b = (read_result(str(file)) for file in files)
    gain = compare_results(a, b, "ndcg@10", samples=SAMPLES, seed=0).difference
    assert row[1] == f"{gain.mean:+.4f}|{gain.low:+.3f} … {gain.high:+.3f}"


def test_what_eval_writes_can_be_shown(tmp_path: Path) -> None:
    build_dataset(
        {"test": word_collection(documents=40, queries=12, split="test")},
        tmp_path / "data",
        name="words",
        source={"kind": "w"},
    )
    record = run_evaluation(
        EvalSettings(model="bm25", data=tmp_path / "data", out=tmp_path / "bm25.json", max_documents=30)
    )
    write_report([], [tmp_path / "bm25.json"], tmp_path / "report.html")
    row = Page(tmp_path / "report.html").row("12 queries of words (test) over 30 documents", "bm25")
    found = record["modes"]["direct"]
    shown = [float(cell.split("|")[0]) for cell in row[:5]]
    assert shown == pytest.approx(
        [found[metric] for metric in ("ndcg@10", "recall@10", "recall@100", "mrr", "map")], abs=5e-5
    )


def test_two_results_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    values = np.array([0.5, 0.25])
    files = [
        write_json(tmp_path / f"{seed}.json", eval_record({"direct": values + seed / 10}, model="rl"))
        for seed in range(2)
    ]
    write_report([], files, tmp_path / "report.html")
    table = Page(tmp_path / "report.html").tables["2 queries of words (test) over 500 documents"]
    shown = [(row[0], row[1].split("|")[0]) for row in table[1:]]
    assert shown == [("rl, direct", "0.3750"), (f"rl, direct ({files[1]})", "0.4750")]


def test_the_budget_is_drawn_and_its_numbers_stand_below(tmp_path: Path) -> None:
    record = budget_record(np.random.default_rng(0))
    write_report(
        [], [write_json(tmp_path / "b.json", record)], tmp_path / "report.html", tmp_path / "pictures"
    )
    page = Page(tmp_path / "report.html")
    assert page.sections == ["budget"]
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["budget-1.png"]
    table = page.tables["runs/rl: 60 queries of words (test) over 500 documents"]
    assert [row[0] for row in table[1:]] == ["direct", "0", "8", "16", "32", "64"]
    for row, point in zip(table[1:], [record["direct"], *record["budgets"]], strict=True):
        interval = point["ndcg@10_interval"]
        assert row[1] == f"{point['ndcg@10']:.4f}|{interval['low']:.3f} … {interval['high']:.3f}"
        assert row[2].split("|")[0] == (
            f"{point['over_direct']['mean']:+.4f}" if "over_direct" in point else ""
        )
        assert row[3:] == ["50.0%", f"{point['reply_tokens']:.1f}", f"{point['milliseconds_per_query']:.1f}"]


@pytest.mark.slow
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = tmp_path / "_<b>$x^{$ rl"
    write_run(run, "rl", steps=3)
    write_run(tmp_path / "other", "rl", steps=3)
    generator = np.random.default_rng(0)
    rollout = rollout_sample(0, generator) | {
        "query": HOSTILE,
        "reply": HOSTILE,
        "top": [{"document": HOSTILE, "relevant": True}],
    }
    search = search_sample(1, "reason", generator) | {
        "query": HOSTILE,
        "reasoning": HOSTILE + "x" * 9_000,
        "set": HOSTILE,
    }
    write_lines(run / "samples.jsonl", [rollout, search])
    write_lines(tmp_path / "other" / "samples.jsonl", [])
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"] = config["data_version"]["name"] = HOSTILE
    config["changes"] = [{"field": HOSTILE, "before": HOSTILE, "now": 1, "step": 2}]
    write_json(run / "config.json", config)
    record = eval_record(
        {"direct": np.array([0.5]), "reason": np.array([0.5])}, model=HOSTILE, name=HOSTILE, step=HOSTILE
    )
    files = [write_json(tmp_path / "e.json", with_controls(record))]
    files.append(write_json(tmp_path / "b.json", budget_record(generator, model=HOSTILE)))
    write_report([run, tmp_path / "other"], files, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    kept = re.sub("[\x00\x1b\ud800\u202e]", "\N{REPLACEMENT CHARACTER}", HOSTILE)
    assert page.texts["query"] == [kept, kept]
    assert page.texts["reply"][0] == kept
    assert page.texts["reply"][1].startswith(kept + "xxx")
    assert page.texts["reply"][1].endswith(f"x… ({len(HOSTILE) + 9_000} characters)")
    assert page.row("Settings and outcome", "starts from") == [kept, "smollm2"]
    # Nothing that a browser would run or fetch: no tag, no handler, no address but the pictures' own bytes.
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "svg",
    }
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href"} & attributes.keys():
            assert str(attributes[name]).startswith("data:image/svg+xml;base64," if tag == "img" else "#")
    policy = next(
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy).startswith("default-src 'none'")


def test_missing_pieces_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "sft", "sft", steps=4)
    for name in ("metrics.jsonl", "samples.jsonl", "eval/dev_000000.json"):
        (tmp_path / "sft" / name).unlink()
    write_report([tmp_path / "sft"], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.sections == ["sft"]
    assert page.row("Settings and outcome", "steps") == ["0 of 1000"]
    assert "No step has been taken yet." in page.text
    # Values that are not finite, and a last line that is being written.
    lines = [
        {"step": step, "loss": value, "kl": 0.0}
        for step, value in enumerate([1.0, float("nan"), float("inf"), 0.5])
    ]
    lines[2]["in_batch_accuracy"] = 0.0
    write_lines(tmp_path / "sft" / "metrics.jsonl", lines)
    with (tmp_path / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_report([tmp_path / "sft"], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.row("Settings and outcome", "steps") == ["4 of 1000"]
    drawn = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    # A term of the loss that is zero throughout was left out; a share may well be zero.
    assert drawn == ["loss: sft: from 0.75 to 0.75", "in-batch accuracy: sft: from 0 to 0"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "sft", "sft", steps=3)
    write_json(tmp_path / "e.json", eval_record({"direct": np.array([0.5])}, model="m"))

    # A run may be named "." as well.
    monkeypatch.chdir(tmp_path / "sft")
    shown = search_r3_here("report", ".", "--eval", "../e.json", "--out", "../report.html")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "../report.html\n", "")
    assert Page(tmp_path / "report.html").sections == ["results", "sft", "samples"]
    shown = search_r3_here("report", "nowhere", "--out", "../other.html")
    assert shown.returncode == 2
    assert re.fullmatch(r"search-r3: nowhere/config\.json: not the config of a run .*\n", shown.stderr)
    assert not (tmp_path / "other.html").exists()
