"""A program for tests: texts encoded on meshes of all devices, beside one device; prints JSON.

Arguments: folder of a model, a JSON list of mesh sizes, process index, number of processes, port of the
coordinator.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
from flax import nnx
from helpers.tiny_models import word_collection
from jax.sharding import Mesh

from search_r3_jax.hub.load_model import load_model
from search_r3_jax.mesh import make_mesh
from search_r3_jax.rollout.encoder import Encoder, ReasonedEncoder
from search_r3_jax.text.prompts import Prompter

# Some long, one of them alone in its batch: their numbers are no multiples of the devices.
TEXTS = [
    document.body[: 40 - 3 * (row % 11)]
    for row, document in enumerate(word_collection(documents=45, queries=1).documents)
]
TEXTS[7] = " ".join(TEXTS)


def encoded(folder: str, mesh: Mesh | None) -> dict[str, Any]:
    """Vectors of both modes, and which part of every batch lay on the first device."""
    model = load_model(folder, mesh=mesh)
    prompter = Prompter(model.tokenizer)
    graph, state = nnx.split(model.decoder)
    encoder = Encoder(graph, prompter, pass_tokens=256, mesh=mesh)
    reasoned = ReasonedEncoder(graph, prompter, pass_tokens=256, mesh=mesh)
    shares, encode = set(), encoder._encode

    def watched(state: nnx.State, shared: Any, ids: Any, *places: Any) -> jax.Array:
        if mesh is not None:
            shares.add(ids.addressable_shards[0].data.shape[0] / ids.shape[0])
        return encode(state, shared, ids, *places)

    replies = [prompter.thought_ids(text[::-1][:9]) for text in TEXTS]
    heard: list[int] = []
    with patch.object(encoder, "_encode", watched):
        direct = encoder.encode(state, TEXTS, max_tokens=200, on_progress=heard.append)
    return {
        "direct": direct,
        "reasoned": reasoned.encode(state, TEXTS, replies, max_tokens=30),
        "finished": sum(heard),
        "shares": sorted(shares),
    }


def main(folder: str, meshes: str) -> None:
    expected = encoded(folder, None)
    report: dict[str, Any] = {"devices": jax.device_count(), "texts": len(TEXTS)}
    for sizes in json.loads(meshes):
        found = encoded(folder, make_mesh(**sizes))
        report[json.dumps(sizes)] = {
            "difference": max(
                float(np.abs(found[mode] - expected[mode]).max()) for mode in ("direct", "reasoned")
            ),
            "norms": [
                float(np.linalg.norm(found["direct"], axis=1).min()),
                float(np.linalg.norm(found["reasoned"], axis=1).min()),
            ],
            **{name: found[name] for name in ("finished", "shares")},
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
