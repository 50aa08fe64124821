"""Shardings: every parameter has a place, sizes that do not divide are named, and eight devices compute what
one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from helpers.jax_processes import with_devices
from jax.sharding import AbstractMesh

from search_r3_jax.config import LoraConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.mesh import (
    LOGICAL_AXES,
    MESH_AXES,
    PARAMETER_AXES,
    check_divisible,
    make_mesh,
    param_shardings,
)

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_axes_of_its_rank(tiny_folders: dict[str, Path], family: str) -> None:
    decoder = with_lora(load_model(tiny_folders[family]), LoraConfig(rank=2), seed=0).decoder
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    shardings = param_shardings(decoder, make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.structure(params) == jax.tree.structure(shardings)
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        axes = PARAMETER_AXES[tuple(key.key for key in path)]
        assert len(axes) == array.ndim
        assert set(axes) <= LOGICAL_AXES.keys()
    assert {axis for axis in LOGICAL_AXES.values() if axis} <= set(MESH_AXES)


def test_sizes_that_do_not_divide_are_named_with_those_that_would(tiny_model) -> None:
    mesh = AbstractMesh((1, 1, 3, 4, 1), MESH_AXES)
    with pytest.raises(UserError) as caught:
        check_divisible(tiny_model.decoder.config, mesh)
    assert "fsdp = 3 does not divide embed 64 (sizes that work: 1, 2, 4, 8, 16, 32, 64)" in str(caught.value)
    assert "tensor = 4 does not divide kv_heads 2 (sizes that work: 1, 2)" in str(caught.value)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"tensor": 2}])
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="mesh"):
        make_mesh(**sizes, devices=jax.devices()[:1])


def test_one_axis_takes_what_is_left() -> None:
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {
        "slice": 1,
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
        "sequence": 1,
    }


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AbstractMesh
from search_r3_jax.config import LoraConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import load_model, torch_tensors, with_lora
from search_r3_jax.mesh import make_mesh

ids = jnp.asarray(np.random.default_rng(0).integers(3, 259, (4, 16)), jnp.int32)
positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), ids.shape)

def logits(model):
    graph, state = nnx.split(model.decoder)
    def run(state):
        decoder = nnx.merge(graph, state)
        return decoder.logits(decoder(ids, positions)[0])
    return np.asarray(jax.jit(run)(state))

out = {"devices": jax.device_count()}
one = load_model(sys.argv[1])
expected = logits(one)
out["size"] = float(np.abs(expected).max())
for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    model = load_model(sys.argv[1], mesh=make_mesh(**sizes))
    pairs = list(zip(torch_tensors(one.decoder), torch_tensors(model.decoder), strict=True))
    kernel = model.decoder.layers.gate.kernel[...]
    out[str(sizes)] = {
        "logits": float(np.abs(logits(model) - expected).max()),
        "adapted": float(np.abs(logits(with_lora(model, LoraConfig(rank=2), seed=0)) - expected).max()),
        "same_tensors": all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs),
        "share": kernel.addressable_shards[0].data.size / kernel.size,
    }
try:
    load_model(sys.argv[1], mesh=make_mesh(tensor=8))
except UserError as error:
    out["error"] = str(error)
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_eight_devices_give_the_logits_of_one(tiny_folders: dict[str, Path], family: str) -> None:
    flags = os.environ | {"XLA_FLAGS": with_devices(8)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_folders[family])],
        capture_output=True,
        text=True,
        env=flags,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    out = json.loads(run.stdout.splitlines()[-1])
    assert out["devices"] == 8
    assert out["size"] > 0.5
    for sizes, share in (({"fsdp": 8}, 1 / 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 1 / 4)):
        found = out[str(sizes)]
        assert found["logits"] <= 1e-5
        assert found["adapted"] <= 1e-5
        assert found["same_tensors"]
        assert found["share"] == share
    assert "tensor = 8 does not divide heads 4 and kv_heads 2 (sizes that work: 1, 2)" in out["error"]
