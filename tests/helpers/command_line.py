"""The command line, in a process of its own or in this one, without the seconds that a new Python needs."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from search_r3_jax import cli


def search_r3_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`search-r3 ARGUMENTS`: its status and what it printed, as `subprocess.run` would give them."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["search-r3", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            status = 0 if ended.code is None else int(ended.code)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(list(arguments), status, out.getvalue(), err.getvalue())


def search_r3_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`search-r3 ARGUMENTS` as a user starts it."""
    command = [sys.executable, "-m", "search_r3_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)
