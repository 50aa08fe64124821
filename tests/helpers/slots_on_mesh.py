"""A program for tests: replies written in slots on meshes of 8 devices, beside one device that writes all at
once; prints JSON.

Argument: the folder of a tiny model.
"""

import json
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from search_r3_jax.config import MeshConfig, SamplerConfig
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.mesh import mesh_from_config
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter

TEXTS, GROUP = [f"text number {i} " * (1 + i % 3) for i in range(8)], 4


def written(folder: Path, mesh_config: MeshConfig | None, slots: int) -> Rollout:
    mesh = None if mesh_config is None else mesh_from_config(mesh_config)
    model = load_model(folder, mesh=mesh)
    graph, state = nnx.split(model.decoder)
    sampler = Sampler(
        graph,
        Prompter(model.tokenizer),
        SamplerConfig(max_think_tokens=9, temperature=1.0, slots=slots),
        mesh=mesh,
    )
    return sampler.sample(state, TEXTS, rollout_seeds(0, 0, range(len(TEXTS)), GROUP), max_tokens=32)


def main(folder: Path) -> None:
    expected = written(folder, None, 0)
    report = {}
    for name, mesh_config in (("fsdp", MeshConfig(fsdp=8)), ("all", MeshConfig(data=2, fsdp=2, tensor=2))):
        # As many slots as a multiple of the devices, and a number that none of them divides.
        for slots in (8, 5):
            found = written(folder, mesh_config, slots)
            report[f"{name} {slots}"] = bool(
                np.array_equal(found.ids, expected.ids)
                and np.array_equal(found.valid, expected.valid)
                and np.allclose(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)
                and np.allclose(found.vectors, expected.vectors, rtol=0, atol=1e-5)
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
