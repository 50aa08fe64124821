"""When a process is gone, the others end with the status that a launcher tries again, whatever they do."""

import signal
import time
from pathlib import Path

import pytest
from helpers.jax_processes import outputs_of, start_processes

from search_r3_jax.distributed.peers import STATUS

PROGRAM = Path(__file__).parents[1] / "helpers" / "dying_cluster.py"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("others", ["wait", "busy", "fail"])
def test_the_others_end_soon_and_alike(victim: int, others: str) -> None:
    started = start_processes(PROGRAM, [str(victim), others], processes=3, devices=1)
    started[victim].wait(timeout=120)
    died = time.monotonic()
    outputs = outputs_of(started, timeout=60)
    expected = [STATUS, STATUS, STATUS]
    expected[victim] = -signal.SIGKILL
    assert [process.returncode for process in started] == expected, "\n".join(err for _, err in outputs)
    assert time.monotonic() - died < 15
    for process, (_, err) in enumerate(outputs):
        assert ("is gone; process" in err) == (process != victim)
