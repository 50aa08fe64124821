"""When a process is gone, the others end with the status that a launcher tries again, whatever they do."""

import signal
import time
from pathlib import Path

import pytest
from helpers.jax_processes import outputs_of, start_processes

from search_r3_jax.errors import TRY_AGAIN

PROGRAM = Path(__file__).parents[1] / "helpers" / "dying_cluster.py"
ERROR = 1


def check(victim: int, how: str, others: str, status: int) -> list[str]:
    """All end soon, the victim with `status`; what each said."""
    started = start_processes(PROGRAM, [str(victim), how, others], processes=3, devices=1)
    started[victim].wait(timeout=120)
    ended = time.monotonic()
    said = [error for _, error in outputs_of(started, timeout=60)]
    expected = [TRY_AGAIN, TRY_AGAIN, TRY_AGAIN]
    expected[victim] = status
    assert [process.returncode for process in started] == expected, "\n".join(said)
    assert time.monotonic() - ended < 15
    for process, words in enumerate(said):
        assert ("is gone; process" in words) == (process != victim)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("others", ["wait", "busy", "fail"])
def test_after_a_death_the_others_end_soon_and_alike(victim: int, others: str) -> None:
    check(victim, "dies", others, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("how", "status"), [("fails", ERROR), ("tries again", TRY_AGAIN)])
def test_an_error_of_one_ends_all(victim: int, how: str, status: int) -> None:
    said = check(victim, how, "wait", status)
    assert ("RuntimeError: an error of its own" in said[victim]) == (how == "fails")
