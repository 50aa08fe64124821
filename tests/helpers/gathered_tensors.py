"""A program for tests: two processes share a model and read all of its tensors; prints what differs from the
model of one process, as JSON.

Arguments: the model's folder, process index, number of processes, port of the coordinator.
"""

import json
import sys

import numpy as np
from helpers.jax_processes import joined

from search_r3_jax.hub.load_model import load_model, torch_tensors
from search_r3_jax.mesh import make_mesh


def main(folder: str) -> None:
    shared = load_model(folder, mesh=make_mesh(fsdp=4)).decoder
    alone = dict(torch_tensors(load_model(folder).decoder))
    found = {name: tensor.copy() for name, tensor in torch_tensors(shared)}
    assert found.keys() == alone.keys()
    different = [name for name, tensor in found.items() if not np.array_equal(tensor, alone[name])]
    print(json.dumps({"tensors": len(found), "different": different}))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main(sys.argv[1])
