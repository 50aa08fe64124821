"""An import holds one tensor of the file beyond the parameters, whatever the mesh; the figures are printed
(`-s`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jax_processes import path_with_torch
from helpers.measure_import_memory import write_random_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both of about 300 MB and more: one whose largest tensor is the embedding, one where it is a layer's."""
    folder = tmp_path_factory.mktemp("memory")
    write_random_checkpoint(folder / "tall", "float32")
    write_random_checkpoint(folder / "wide", "bfloat16", V=512, D=1024, F=24_000, layers=2)
    return folder


@pytest.mark.parametrize("kind", ["tall", "wide"])
@pytest.mark.parametrize("devices", [1, 8])
def test_peak_memory(checkpoints: Path, kind: str, devices: int) -> None:
    program = Path(__file__).parents[1] / "helpers" / "measure_import_memory.py"
    # What makes other tests fast takes memory of its own: kept programs, one thread for torch.
    faster = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(faster)}
    flags = inherited | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": path_with_torch(),
    }
    command = [sys.executable, str(program), str(checkpoints / kind), str(devices)]
    run = subprocess.run(command, capture_output=True, text=True, env=flags, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    print(kind, found)
    assert len(list((checkpoints / kind).glob("*.safetensors"))) >= 3
    assert found["parameters_mb"] > 300
    assert found["import_ratio"] <= 1.3
    # An export's walk: the tensor, and the one before, which the loop still holds.
    assert found["export_ratio"] <= 2.2
