"""Encoding on a mesh: every device has its share of each batch, and eight compute what one computes."""

import json
from pathlib import Path

import pytest
from helpers.jax_processes import run_processes

PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_encoding.py"
MESHES = {
    "data": ({"data": 8, "fsdp": 1}, 1 / 8),
    "fsdp": ({"fsdp": 8}, 1 / 8),
    "mixed": ({"data": 2, "fsdp": 2, "tensor": 2}, 1 / 4),
    "tokens": ({"slice": 2, "fsdp": 2, "sequence": 2}, 1 / 4),
}


@pytest.mark.slow
def test_eight_devices_encode_as_one_does(tiny_folders: dict[str, Path]) -> None:
    arguments = [str(tiny_folders["llama"]), json.dumps([sizes for sizes, _ in MESHES.values()])]
    report = run_processes(PROGRAM, arguments, processes=1, devices=8, timeout=500)[0]
    assert report["devices"] == 8
    for sizes, share in MESHES.values():
        found = report[json.dumps(sizes)]
        assert found["difference"] <= 1e-6
        assert min(found["norms"]) == pytest.approx(1, abs=1e-5)
        assert (found["finished"], found["shares"]) == (report["texts"], [share])
