"""Stage 2 on a mesh: eight devices sample and update as one does, whether or not a micro-batch's prompts can be shared out."""

import json
from pathlib import Path

import pytest
from processes import run_processes

PROGRAM = Path(__file__).with_name("sharded_rl.py")
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("qwen2", "lora"), ("llama", "full")])
def test_eight_devices_compute_what_one_computes(tiny_folders: dict[str, Path], family: str, kind: str) -> None:
    arguments = [str(tiny_folders[family]), kind, json.dumps(MESHES)]
    report = run_processes(PROGRAM, arguments, processes=1, devices=8, timeout=900)[0]
    assert report["devices"] == 8
    for sizes in MESHES:
        for micro_queries in (16, 4):
            found = report[f"{micro_queries} {json.dumps(sizes)}"]
            assert found["same_tokens"]
            assert found["vectors"] <= 1e-5
            # A policy that has left its reference: every term of the loss is at work.
            assert found["kl"] > 1e-2
            assert found["scalars"] <= 1e-5
            assert found["gradient"] <= 1e-5
            assert found["rows_share"] == 1 / (sizes.get("data", 1) * sizes["fsdp"])
