"""Two sides of a benchmark as processes: each loads, warms up, says so, and then does one portion of work a
line that it is told."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

END = -1
"""The number that asks a side for its peak memory and ends it."""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A side: `program worker ARGUMENTS`, spoken to through pipes."""
    command = [sys.executable, program, "worker", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(side: subprocess.Popen[str], number: int | None = None) -> dict[str, Any]:
    """What a side answers to a portion's number; None waits for its first word."""
    if side.stdin is None or side.stdout is None:
        raise ValueError("a side is spoken to through pipes")
    if number is not None:
        side.stdin.write(f"{number}\n")
        side.stdin.flush()
    line = side.stdout.readline()
    if not line:
        raise SystemExit(f"a side ended with status {side.wait()}")
    return json.loads(line)


def dismissed(side: subprocess.Popen[str]) -> float:
    """Peak memory in MiB of a side, which ends."""
    peak = told(side, END)["peak_mib"]
    side.wait()
    return peak


def numbers() -> Iterator[int]:
    """In a side: says that it is ready, then gives the numbers of portions as they come; the last answer is
    the peak memory."""
    answer({})
    for line in sys.stdin:
        if int(line) == END:
            status = Path("/proc/self/status").read_text()
            answer({"peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024})
            return
        yield int(line)


def answer(values: dict[str, Any]) -> None:
    """In a side: what it has to say of a portion."""
    print(json.dumps(values), flush=True)


def serve(work: Callable[[int], dict[str, Any]]) -> None:
    """In a side: every portion's work, and its answer."""
    for number in numbers():
        answer(work(number))


class Clock:
    """Wall-clock and processor seconds by phase, in `spent`: `lap` ends one, and the next begins."""

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, float]] = {"seconds": {}, "cpu_seconds": {}}
        self._since = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """What passed since the lap before is this phase's; one that comes twice adds up."""
        now = time.perf_counter(), time.process_time()
        for spent, since, until in zip(self.spent.values(), self._since, now, strict=True):
            spent[phase] = spent.get(phase, 0.0) + until - since
        self._since = now
