"""Time left is what the stage then takes: compiling, evaluating, saving and waiting do not mislead it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.clock import Timer

from search_r3_jax.training.time_left import TimeLeft


def estimates(
    total: int,
    step_seconds: Callable[[int], float],
    *,
    eval_every: int = 0,
    save_every: int = 0,
    first: int = 0,
    compiling: float = 0.0,
    waits: dict[int, float] | None = None,
) -> list[tuple[int, float, float]]:
    """(steps done, seconds said to be left, seconds it then took) of a stage with a hand-made sequence of
    steps; an evaluation takes 20 s, a save a fifth of a second."""
    clock, compiled = Timer(), Timer()
    left = TimeLeft(total, eval_every=eval_every, save_every=save_every, clock=clock, compiling=compiled)
    if eval_every and not first:
        with left.aside("evaluation"):
            clock.wait(20 + 90)
            compiled.wait(90)
    clock.wait(1000)  # Loading is no step.
    left.start()
    said: list[tuple[int, float, float]] = []
    for step in range(first, total):
        done = step + 1
        with left.aside("wait"):
            clock.wait((waits or {}).get(step, 0.0))
        if step == first:
            clock.wait(compiling)
            compiled.wait(compiling)
        clock.wait(step_seconds(step))
        evaluated = bool(eval_every) and (done % eval_every == 0 or done == total)
        if evaluated:
            with left.aside("evaluation"):
                clock.wait(20)
        left.step_ended()
        seconds = left.seconds(done)
        assert seconds is not None
        said.append((done, seconds, clock()))
        if evaluated or done == total or (save_every and done % save_every == 0):
            with left.aside("save"):
                clock.wait(0.2)
    return [(done, seconds, clock() - at) for done, seconds, at in said]


def assert_close(said: list[tuple[int, float, float]], *, since: int = 3) -> None:
    for done, seconds, took in said:
        # A save of the last step alone is nothing to be told of.
        if done >= since and took > 0.5:
            assert seconds == pytest.approx(took, rel=0.25), done


def test_a_first_step_that_compiles_and_evaluations_do_not_mislead() -> None:
    # Nobody says that step 0 compiles: it is left out because it is the first.
    said = estimates(60, lambda step: 60.0 if step == 0 else 1.5, eval_every=10, save_every=25)
    assert_close(said)
    done, seconds, took = said[2]
    assert (done, took) == (3, pytest.approx(57 * 1.5 + 6 * 20 + 7 * 0.2))
    assert seconds == pytest.approx(57 * 1.5 + 6 * 20)


def test_compiling_that_is_told_of_leaves_the_first_step_usable() -> None:
    said = estimates(20, lambda step: 2.0, compiling=300.0)
    assert_close(said, since=1)


@pytest.mark.parametrize(
    "step_seconds",
    [
        lambda step: 1.0 + 0.2 * (step % 2),
        lambda step: 1.0 if step % 3 else 1.5,
        lambda step: 30.0 if step == 7 else 1.5,
    ],
    ids=["in turn", "every third longer", "one that hung"],
)
def test_steps_that_differ(step_seconds: Callable[[int], float]) -> None:
    said = estimates(40, step_seconds, eval_every=10, first=0)
    # What hung is over from there on; before, nobody could know.
    assert_close([each for each in said if each[0] == 3 or each[0] > 10], since=3)


def test_steps_that_become_shorter_are_followed() -> None:
    said = estimates(200, lambda step: 4.0 if step < 100 else 1.0)
    assert_close([each for each in said if each[0] > 125])


def test_waiting_for_an_index_is_no_part_of_a_step() -> None:
    said = estimates(30, lambda step: 1.0, waits={4: 500.0})
    assert_close([each for each in said if each[0] > 4])


def test_a_resumed_call_expects_the_evaluations_of_the_one_before() -> None:
    clock = Timer()
    left = TimeLeft(40, eval_every=10, clock=clock, compiling=lambda: 0.0)
    left.expect("evaluation", 20.0)
    left.expect("save", None)
    for _ in range(3):
        clock.wait(1.0)
        left.step_ended()
    assert left.seconds(23) == pytest.approx(17 + 2 * 20)
    # A measured one takes its place, and one of which nothing is known counts for nothing.
    with left.aside("evaluation"):
        clock.wait(10)
    assert left.last("evaluation") == 10
    assert TimeLeft(3, clock=clock, compiling=lambda: 0.0).seconds(0) is None


def test_what_saves_while_it_waits_is_counted_once() -> None:
    clock = Timer()
    left = TimeLeft(10, clock=clock, compiling=lambda: 0.0)
    for _ in range(2):
        with left.aside("wait"):
            clock.wait(5)
            with left.aside("save"):
                clock.wait(7)
        clock.wait(1)
        left.step_ended()
    assert left.metrics(9)["seconds_each"] == 1
