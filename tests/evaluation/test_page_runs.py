"""`search-r3 report` of runs: pictures, facts and rollouts are those of the files."""

import base64
import datetime
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.report_inputs import (
    HOSTILE,
    rollout_sample,
    write_lines,
    write_run,
)
from helpers.report_page import Page
from matplotlib import pyplot

from search_r3_jax import __version__
from search_r3_jax.evaluation import page as page_module
from search_r3_jax.evaluation.page import SHOWN_ROLLOUTS, write_report


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is written: the pictures are drawn in the others."""
    monkeypatch.setattr(page_module, "draw_panels", lambda *_: [])


@pytest.mark.slow
def test_runs_of_a_stage_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = [write_run(tmp_path / str(seed) / "rl", "rl", seed=seed, steps=30) for seed in range(2)]
    before = json.loads((tmp_path / "0/rl/eval/dev_000000.json").read_text())["results"]["words"]["direct"][
        "ndcg@10"
    ]
    # Kept open, so that what was drawn can be read.
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    monkeypatch.setitem(pyplot.rcParams, "figure.max_open_warning", 0)
    others = set(pyplot.get_fignums())
    write_report([tmp_path / "0/rl", tmp_path / "1/rl"], [], tmp_path / "report.html", tmp_path / "pictures")
    drawn = {
        figure.axes[0].get_title(loc="left"): figure
        for figure in map(pyplot.figure, set(pyplot.get_fignums()) - others)
    }
    monkeypatch.undo()
    pyplot.close("all")

    rewards = np.array([line["reward"] for line in metrics[0]])
    pale, strong, *_ = drawn["reward"].axes[0].get_lines()
    np.testing.assert_allclose(np.asarray(pale.get_xydata()), np.stack([np.arange(1, 31), rewards], axis=1))
    np.testing.assert_allclose(
        np.asarray(strong.get_ydata()), [rewards[max(0, i - 4) : i + 1].mean() for i in range(30)]
    )
    assert [text.get_text() for text in drawn["reward"].legends[0].get_texts()] == [
        "0/rl",
        "1/rl",
        "mean",
        "best of a group",
    ]
    # The evaluation before the first step stands in no line of the metrics.
    direct = np.asarray(drawn["nDCG@10, development queries"].axes[0].get_lines()[0].get_xydata())
    np.testing.assert_allclose(
        direct, [[0, before], *([at, metrics[0][at - 1]["dev_direct_ndcg@10"]] for at in (15, 30))]
    )

    pictures = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert {"rl-reward.png", "rl-dev-ndcg.png", "index-index-age.png", "index-drift.png"} <= pictures
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    images = [attributes for tag, attributes in Page(tmp_path / "report.html").tags if tag == "img"]
    assert len(images) == len(pictures) == len(drawn)
    assert all(base64.b64decode(str(image["src"]).split(",")[1]).startswith(b"<?xml") for image in images)
    told = next(str(image["alt"]) for image in images if str(image["alt"]).startswith("reward:"))
    assert f"0/rl, mean: from {rewards[:5].mean():.4g} to {rewards[-5:].mean():.4g}" in told


@pytest.mark.usefixtures("without_pictures")
def test_facts_of_stage_2_stand_side_by_side(tmp_path: Path) -> None:
    metrics = [write_run(tmp_path / str(seed) / "rl", "rl", seed=seed, steps=30) for seed in range(2)]
    write_report([tmp_path / "0/rl", tmp_path / "1/rl"], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.sections == ["rl", "index", "samples"]

    def column(scalar: str) -> list[np.ndarray]:
        return [np.array([line[scalar] for line in lines if scalar in line]) for lines in metrics]

    title = "Settings and outcome"
    assert page.tables[title][0] == ["", "0/rl", "1/rl"]
    assert page.row(title, "seed") == ["0", "1"]
    assert page.row(title, "data") == ["words (train)"] * 2
    assert page.row(title, "steps") == ["30 of 1000"] * 2
    assert page.row(title, "time in steps") == ["1 h 0 min"] * 2
    assert page.row(title, "reward, last quarter") == [
        f"{values[-7:].mean():.4f}" for values in column("reward")
    ]
    title = "How stale the index was"
    assert page.row(title, "age in steps, mean") == [f"{values.mean():.1f}" for values in column("index_age")]
    swaps = [
        sum(before != now for before, now in itertools.pairwise(values)) for values in column("index_step")
    ]
    assert page.row(title, "new versions taken in") == [str(count) for count in swaps]
    least = [f"{values.min():.3f}" for values in column("drift_cosine")]
    assert page.row(title, "drift since the last checkpoint, least cosine") == least


def test_facts_and_losses_of_stage_1(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "sft", "sft", steps=40)
    pages = []
    for _ in range(2):
        write_report([tmp_path / "sft"], [], tmp_path / "a.html")
        pages.append((tmp_path / "a.html").read_bytes())
    # The same files give the same page.
    assert pages[0] == pages[1]
    page, title = Page(tmp_path / "a.html"), "Settings and outcome"
    assert page.sections == ["sft", "samples"]
    assert page.row(title, "skipped updates") == ["2"]
    assert page.row(title, "time in steps") == ["1.7 min"]
    assert page.row(title, "loss, last quarter") == [
        f"{np.mean([line['loss'] for line in metrics[-10:]]):.4f}"
    ]
    scores = {at: metrics[at - 1]["dev_reason_ndcg@10"] for at in (20, 40)}
    best = max(scores, key=lambda at: scores[at])
    assert page.row(title, "dev nDCG@10, reasoned") == [
        f"{scores[best]:.4f} at step {best}; last {scores[40]:.4f}"
    ]
    drawn = [str(attributes["alt"]).split(":")[0] for tag, attributes in page.tags if tag == "img"]
    assert {"loss", "InfoNCE", "gradient norm"} <= set(drawn)
    assert "triplet margin loss" not in drawn


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_an_index_that_is_always_new_is_drawn_without_a_word(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "rl", "rl", steps=3)
    write_lines(
        tmp_path / "rl" / "metrics.jsonl",
        [line | {"index_age": 0.0, "reencoded_share": 0.0} for line in metrics],
    )
    write_report([tmp_path / "rl"], [], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").row("How stale the index was", "age in steps, largest") == ["0"]


@pytest.mark.usefixtures("without_pictures")
def test_only_some_of_many_rollouts_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "rl", "rl", steps=50)
    write_report([tmp_path / "rl"], [], tmp_path / "report.html")
    shown = [text for text in Page(tmp_path / "report.html").texts["query"] if text.startswith("how to")]
    assert len(shown) == SHOWN_ROLLOUTS
    assert shown[0].endswith("(0)")
    assert shown[-1].endswith("(49)")


@pytest.mark.usefixtures("without_pictures")
def test_day_command_and_versions_stand_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a place" / "host" / "mine" / "sft", "sft", steps=3)
    write_run(tmp_path / "here" / "rl", "rl", steps=3)
    monkeypatch.chdir(tmp_path / "here")
    runs = [tmp_path / "a place" / "host" / "mine" / "sft", tmp_path / "here" / "rl"]
    write_report(runs, [], Path("report.html"))
    page = Page(Path("report.html"))
    assert "search-r3 report mine/sft rl --out report.html" in page.text
    assert str(tmp_path) not in page.text
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert f"{today}. Made by" in page.text
    assert (
        f"search_r3_jax {__version__}, Python {platform.python_version()}, jax {jax.__version__}" in page.text
    )
    assert page.row("Settings and outcome", "last step written on") == [today]


@pytest.mark.usefixtures("without_pictures")
def test_rollouts_show_the_documents_that_they_found(tmp_path: Path) -> None:
    write_run(tmp_path / "rl", "rl", steps=3)
    rollout = rollout_sample(0, np.random.default_rng(0)) | {
        "top": [
            {"document": "d1", "relevant": False, "text": f"{HOSTILE} read it"},
            # Of an older version.
            {"document": "d2", "relevant": True},
        ]
    }
    write_lines(tmp_path / "rl" / "samples.jsonl", [rollout])
    write_report([tmp_path / "rl"], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    (found,) = page.texts["document"]
    assert found.startswith("<script>alert('x')</script>")
    assert found.endswith("read it")
    assert "<bdi>d2</bdi> ✓ relevant" in page.text


@pytest.mark.usefixtures("without_pictures")
def test_what_the_index_blocked_is_explained(tmp_path: Path) -> None:
    write_run(tmp_path / "rl", "rl", steps=3)
    write_report([tmp_path / "rl"], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.row("How stale the index was", "time blocked by the index") == ["0.10%"]
    assert "the seconds in which training waited for an index version or opened one" in page.text


def axes_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, values: list[list[float]], scalar: str
) -> Any:
    """The axes of a picture of runs of stage 1 with these values of a scalar, one a step."""
    runs = []
    for at, of_run in enumerate(values):
        runs.append(tmp_path / str(at) / "sft")
        write_run(runs[-1], "sft", steps=4)
        lines = [{"step": step, scalar: value} for step, value in enumerate(of_run)]
        write_lines(runs[-1] / "metrics.jsonl", lines)
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    monkeypatch.setitem(pyplot.rcParams, "figure.max_open_warning", 0)
    others = set(pyplot.get_fignums())
    write_report(runs, [], tmp_path / "report.html")
    drawn = [pyplot.figure(number).axes[0] for number in set(pyplot.get_fignums()) - others]
    monkeypatch.undo()
    (axes,) = [each for each in drawn if each.get_title(loc="left") == title]
    pyplot.close("all")
    return axes


def test_a_first_step_far_off_does_not_flatten_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [2.0, 1.5, 1.2, 1.0]
    axes = axes_of(
        tmp_path, monkeypatch, "gradient norm", [[400.0, *later], [300.0, *later]], "gradient_norm"
    )
    bottom, top = axes.get_ylim()
    assert 0.8 < bottom < 1.0
    assert 2.0 < top < 2.2
    # Each is marked at the edge, and one label names them.
    marks = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in marks] == [(1, top), (1, top)]
    assert [text.get_text() for text in axes.texts] == ["first: 400, 300"]


def test_a_first_step_that_is_one_of_many_is_drawn_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = axes_of(tmp_path, monkeypatch, "gradient norm", [[2.5, 2.0, 1.5, 1.0]], "gradient_norm")
    assert axes.get_ylim()[1] > 2.5
    assert not axes.texts
