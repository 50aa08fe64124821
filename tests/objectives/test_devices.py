"""Losses and gradients with the batch across devices and processes are those of one device."""

from pathlib import Path
from typing import Any

import pytest
from helpers.jax_processes import run_processes

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "helpers" / "losses_across_devices.py"


def run(processes: int, devices: int) -> list[dict[str, Any]]:
    """The reports of all processes, each with so many devices."""
    return run_processes(PROGRAM, [], processes=processes, devices=devices, timeout=300)


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
