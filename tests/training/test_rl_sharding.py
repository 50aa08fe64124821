"""Stage 2 on a mesh: eight devices sample and update as one does, whether or not a micro-batch's prompts can
be shared out."""

import json
from pathlib import Path

import pytest
from helpers.jax_processes import run_processes
from helpers.mesh_shapes import covering_meshes, every_mesh

PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_rl_update.py"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "part"), [("qwen2", "lora", 0), ("llama", "full", 1)])
@pytest.mark.parametrize(
    "meshes",
    [covering_meshes(), pytest.param(every_mesh(8, most_tensor=2), marks=pytest.mark.exhaustive)],
    ids=len,
)
def test_meshes_compute_what_one_device_computes(
    tiny_folders: dict[str, Path], meshes: list[dict[str, int]], family: str, kind: str, part: int
) -> None:
    # Two micro-batches of 16 queries: their rows and their prompts are shared out; of 4 queries, only the
    # rows.
    cases = [(16, sizes, 0.0) for sizes in meshes[part::2]]
    cases.append((4, [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}][part], 0.0))
    # A device holds half of the weights while replies are written, or a tenth: then they are gathered for
    # every token.
    cases.append((16, {"fsdp": 8}, [0.1, 0.6][part]))
    arguments = [str(tiny_folders[family]), kind, json.dumps(cases)]
    report = run_processes(PROGRAM, arguments, processes=1, devices=8, timeout=1500)[0]
    assert report["devices"] == 8
    for micro_queries, sizes, share in cases:
        found = report[f"{micro_queries} {json.dumps(sizes)} {share}"]
        assert found["same_tokens"]
        assert found["vectors"] <= 1e-5
        # A policy that has left its reference: every term of the loss is at work.
        assert found["kl"] > 1e-2
        assert found["scalars"] <= 1e-5
        assert found["gradient"] <= 1e-5
        assert found["rows_share"] == 1 / (sizes.get("slice", 1) * sizes.get("data", 1) * sizes["fsdp"])
