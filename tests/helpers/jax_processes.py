"""Starts a program in one process or several that form one JAX cluster on this machine's CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def with_devices(devices: int) -> str:
    """The `XLA_FLAGS` of this process and a flag for so many devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()


def path_with_torch() -> str:
    """`PYTHONPATH` of this process for a program that does need torch."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if Path(entry).name != "without_torch")


def run_processes(
    program: Path, arguments: list[str], *, processes: int, devices: int, timeout: float
) -> list[dict[str, Any]]:
    """The last line of each process, as JSON; each has so many devices, and is told its number, how many
    there are, and a port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": with_devices(devices),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), path_with_torch()]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(program), *arguments, str(process), str(processes), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
