"""Tensors of a model that two processes share are whole in each of them."""

from pathlib import Path

import pytest
from helpers.jax_processes import run_processes

PROGRAM = Path(__file__).parents[1] / "helpers" / "gathered_tensors.py"


@pytest.mark.slow
def test_each_process_reads_every_tensor(tiny_folders: dict[str, Path]) -> None:
    for report in run_processes(PROGRAM, [str(tiny_folders["qwen2"])], processes=2, devices=2, timeout=180):
        assert report["tensors"] > 20
        assert report["different"] == []
