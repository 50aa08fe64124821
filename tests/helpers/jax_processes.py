"""Starts a program in one process or several that form one JAX cluster on this machine's CPU."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_r3_jax.distributed.runtime import join_cluster
from search_r3_jax.distributed.spec import Cluster


def with_devices(devices: int) -> str:
    """The `XLA_FLAGS` of this process and a flag for so many devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()


def path_with_torch() -> str:
    """`PYTHONPATH` of this process for a program that does need torch."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if Path(entry).name != "without_torch")


def start_processes(
    program: Path, arguments: list[str], *, processes: int, devices: int
) -> list[subprocess.Popen[str]]:
    """The processes; each has so many devices, and is told its number, how many there are, and a port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": with_devices(devices),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), path_with_torch()]),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program), *arguments, str(process), str(processes), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(processes)
    ]


def outputs_of(started: list[subprocess.Popen[str]], *, timeout: float) -> list[tuple[str, str]]:
    """What each wrote to its two streams; those that have not ended after `timeout` seconds are killed."""
    try:
        return [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()


def run_processes(
    program: Path, arguments: list[str], *, processes: int, devices: int, timeout: float
) -> list[dict[str, Any]]:
    """The last line of each process, as JSON."""
    started = start_processes(program, arguments, processes=processes, devices=devices)
    outputs = outputs_of(started, timeout=timeout)
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@contextmanager
def joined(arguments: Sequence[str]) -> Iterator[None]:
    """A program is one of the processes: its number, how many there are, and the port are `arguments`."""
    process, processes, port = map(int, arguments)
    if processes == 1:
        yield
        return
    with join_cluster(Cluster(coordinator=f"localhost:{port}", processes=processes, process=process)):
        yield
