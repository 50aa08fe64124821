"""The pace of work, and what a bar says of it."""

import io

import pytest
from helpers.clock import Timer

from search_r3_jax import console, pace
from search_r3_jax.console import TextConsole, progress_bar
from search_r3_jax.pace import Pace, typical


def test_a_part_that_hung_is_not_typical() -> None:
    assert typical([1.0, 3.0]) == 2.0
    assert typical([1.0] * 9 + [100.0]) == 1.0


def test_the_pace_is_that_of_recent_parts_without_what_is_aside() -> None:
    clock, compiling = Timer(), Timer()
    work = Pace(aside=compiling, clock=clock)
    clock.wait(1000)
    work.add(8)
    assert work.seconds_each() is None
    for _ in range(4):
        clock.wait(16 + 50)
        compiling.wait(50)
        work.add(8)
    assert work.seconds_each() == 2.0
    for _ in range(pace.RECENT):
        clock.wait(8)
        work.add(8)
    assert work.seconds_each() == 1.0


def test_a_bar_without_a_terminal_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Timer(), io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", clock)
    with progress_bar(TextConsole(out), "documents", 100) as bar:
        bar._pace = Pace(clock=clock)
        clock.wait(60)
        bar.advance(10)
        for _ in range(3):
            clock.wait(20)
            bar.advance(10)
    assert out.getvalue().splitlines() == [
        "      documents 20/100, 2.0 s each, 2:40 left",
        "      documents 30/100, 2.0 s each, 2:20 left",
        "      documents 40/100, 2.0 s each, 2:00 left",
    ]


def test_who_knows_better_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Timer(), io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", clock)
    with progress_bar(TextConsole(out), "steps", 10) as bar:
        bar.to(1, each=4.0, left=500.0)
        clock.wait(30)
        # An evaluation of its own bar stands between two steps.
        bar.part("words: documents", 0, 4)
        clock.wait(30)
        bar.part("words: documents", 4, 4)
        clock.wait(30)
        bar.to(2, "loss 1", each=4.0, left=75.4)
    assert out.getvalue().splitlines()[-1] == "      steps 2/10, 4.0 s each, 1:15 left  loss 1"


def test_a_terminal_shows_a_bar_for_an_evaluation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    with progress_bar(TextConsole(out), "steps", 10) as bar:
        bar.to(1, each=4.0, left=500.0)
        bar.part("words: documents", 0, 4)
        assert bar._progress is not None
        assert [task.description for task in bar._progress.tasks] == ["steps", "words: documents"]
        bar._progress.refresh()
        bar.part("words: queries", 0, 2)
        assert [task.description for task in bar._progress.tasks] == ["steps", "words: queries"]
        bar.part("words: queries", 2, 2)
        assert [task.description for task in bar._progress.tasks] == ["steps"]
    shown = out.getvalue()
    assert "8:20 left" in shown or "8:19 left" in shown
    assert "words: documents" in shown
