"""Losses and gradients with the batch across devices and processes are those of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("losses_across_devices.py")


def run(processes: int, devices: int) -> list[dict[str, Any]]:
    """The reports of all processes, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(process), str(processes), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def check(report: dict[str, Any]) -> None:
    assert report["devices"] == 8
    for name in ("whole", "cached", "infonce"):
        assert report[name] <= 1e-5, name
    # Every device's documents are negatives of every query: a loss per device is a different one.
    assert report["per_device"] > 0.1


def test_eight_devices_compute_what_one_computes() -> None:
    check(run(processes=1, devices=8)[0])


def test_two_processes_of_four_devices_compute_what_one_computes() -> None:
    for report in run(processes=2, devices=4):
        assert report["processes"] == 2
        check(report)
