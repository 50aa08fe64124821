"""A program for tests: the decoder on the TPU kernel, interpreted, on a mesh of 8 devices, beside one device
without it; prints JSON.

Arguments: a JSON list of mesh sizes, process index, number of processes, port of the coordinator.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import tiny_models as tiny
from jax.sharding import Mesh

from search_r3_jax.mesh import make_mesh, use_mesh
from search_r3_jax.models.attention import Backend
from search_r3_jax.models.decoder import Decoder, Text
from search_r3_jax.models.kv_block import EMPTY_POSITION
from search_r3_jax.training.sharding import params_shardings

B, T, PREFIX = 8, 250, 9
CONFIG = dataclasses.replace(tiny.CONFIG, layers=1, hidden_size=64)


def found(backend: Backend, mesh: Mesh | None) -> Any:
    """Hidden states of two packed texts a row behind a shared prefix, and the gradient of a sum of them."""
    generator = np.random.default_rng(0)
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), attention=backend)
    graph, params = nnx.split(decoder)
    if mesh is not None:
        params = jax.device_put(params, params_shardings(params, mesh))
    prefix, ids = generator.integers(0, 300, (1, PREFIX)), generator.integers(0, 300, (B, T))
    positions = (
        np.concatenate([np.arange(PREFIX, PREFIX + 150), np.arange(PREFIX, PREFIX + 100)])[None]
        .repeat(B, axis=0)
        .astype(np.int32)
    )
    segments = (np.arange(T) >= 150).astype(np.int32)[None].repeat(B, axis=0)
    positions[1, 220:], segments[1, 220:] = EMPTY_POSITION, -1
    weights = generator.standard_normal((B, T, CONFIG.hidden_size)) * (positions != EMPTY_POSITION)[..., None]

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        texts = [
            Text(jnp.asarray(prefix, jnp.int32), jnp.arange(PREFIX, dtype=jnp.int32)[None]),
            Text(jnp.asarray(ids, jnp.int32), jnp.asarray(positions), jnp.asarray(segments), behind=(0,)),
        ]
        with use_mesh(mesh):
            hidden, _ = nnx.merge(graph, params).read(texts)[1]
        return jnp.sum(hidden * weights), hidden * (positions != EMPTY_POSITION)[..., None]

    (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.tree.map(np.asarray, (hidden, nnx.to_pure_dict(gradient)))


def main(meshes: str) -> None:
    expected = jax.tree.leaves(found("xla", None))
    report: dict[str, Any] = {"devices": jax.device_count(), "size": float(np.abs(expected[0]).max())}
    for sizes in json.loads(meshes):
        pairs = zip(jax.tree.leaves(found("splash", make_mesh(**sizes))), expected, strict=True)
        report[json.dumps(sizes)] = max(
            float(np.abs(mine - theirs).max() / np.abs(theirs).max()) for mine, theirs in pairs
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
