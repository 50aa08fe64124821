"""A program for tests: steps of stage 1 on meshes of all devices, beside those of one device; prints JSON.

Arguments: folder of a model, "lora" or "full", a JSON list of mesh sizes, number of steps, pairs of a batch,
pairs of a chunk, process index, number of processes, port of the coordinator.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from helpers.jax_processes import joined
from helpers.tiny_models import word_collection
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.config import LoraConfig, RunConfig, SftConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.mesh import make_mesh
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft import make_pipeline
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.sharding import put_batch
from search_r3_jax.training.state import init_state, state_shardings


def config_of(folder: str, *, lora: bool, pairs: int = 32, chunk: int = 16) -> RunConfig:
    """All four losses, GradCache over two chunks, both formats, mined negatives; adapters with dropout."""
    return RunConfig(
        model=folder,
        compute_dtype="float32",
        remat="dots",
        text=TextConfig(max_query_tokens=16, max_document_tokens=32),
        lora=LoraConfig(rank=4, dropout=0.1) if lora else LoraConfig(rank=0),
        sft=SftConfig(
            global_batch=pairs,
            encode_chunk=chunk,
            negatives=2,
            reasoned_share=0.25,
            reasoning="key_terms",
            key_terms=3,
        ),
    )


def collection_of() -> Collection:
    """Queries with one or two positives and up to three judged negatives."""
    plain = word_collection(documents=80, queries=80)
    ids = [document.doc_id for document in plain.documents]
    queries = tuple(
        dataclasses.replace(
            query,
            positives={ids[(i + k) % 80]: 1 + k for k in range(1 + i % 2)},
            negatives=tuple(ids[(i + 7 + k) % 80] for k in range(i % 4)),
        )
        for i, query in enumerate(plain.queries)
    )
    return dataclasses.replace(plain, queries=queries)


def keep_gradient() -> optax.GradientTransformation:
    """Plain descent whose state is the last gradient."""
    return optax.chain(optax.trace(decay=0.0), optax.scale(-1e-3))


def steps(config: RunConfig, *, count: int, mesh: Mesh | None) -> dict[str, Any]:
    """Scalars and gradients of every step, the parameters after the last, and how the state lay on its
    way."""
    folder, lora = config.model, config.lora.rank > 0
    model = with_lora(load_model(folder, remat=config.remat, mesh=mesh), config.lora, seed=0)
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [collection_of()], prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    if lora:
        # Adapters that do something: at zero, half of them have no gradient.
        generator = np.random.default_rng(0)
        noise = jax.tree.map(lambda x: 0.05 * generator.standard_normal(x.shape).astype(np.float32), params)
        params = jax.jit(lambda params: jax.tree.map(lambda x, more: x + more, params, noise))(params)
    optimizer = keep_gradient()
    shardings = None if mesh is None else state_shardings(params, optimizer, mesh)
    state = init_state(params, optimizer, shardings)
    reference = None if lora else params
    step_function = make_step(graph, prompter, optimizer, config.sft, shardings)
    found: dict[str, Any] = {"scalars": [], "gradients": []}
    shapes = []
    for step in range(count):
        key = jax.random.fold_in(jax.random.key(0), step) if lora else None
        batch = put_batch(pipeline.batch(step), mesh)
        shapes.append([batch.queries.ids.shape, batch.documents.ids.shape, batch.queries.reply_at.shape])
        before = state
        state, scalars = step_function(state, frozen, batch, reference, key)
        found["scalars"].append({name: float(value) for name, value in scalars.items()})
        found["gradients"].append(whole(state.optimizer[0].trace, mesh))
        assert shardings is None or jax.tree.map(lambda x: x.sharding, (before, state)) == (
            shardings,
            shardings,
        )
    local: Any = put_batch(pipeline.batch(0), mesh).queries.ids
    kernel = model.decoder.layers.gate.kernel[...]
    return found | {
        "params": whole(state.params, mesh),
        "compiled": step_function._cache_size(),
        "shapes": len({str(shape) for shape in shapes}),
        "kernel_share": kernel.addressable_shards[0].data.size / kernel.size,
        "rows_share": 1.0 if mesh is None else local.addressable_shards[0].data.size / local.size,
    }


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays in the memory of this process, whatever they lie on."""
    if mesh is not None:
        tree = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return nnx.to_pure_dict(jax.tree.map(np.asarray, tree))


def difference(ours: Any, expected: Any) -> float:
    """The largest difference of two pytrees, relative to the largest number of each leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main(
    folder: str,
    kind: str,
    meshes: str,
    count: int,
    pairs: int,
    chunk: int,
) -> None:
    config = config_of(folder, lora=kind == "lora", pairs=pairs, chunk=chunk)
    expected = steps(config, count=count, mesh=None)
    report: dict[str, Any] = {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "scalars": expected["scalars"],
    }
    for sizes in json.loads(meshes):
        found = steps(config, count=count, mesh=make_mesh(**sizes))
        report[json.dumps(sizes)] = {
            "scalars": max(
                abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name]))
                for ours, theirs in zip(found["scalars"], expected["scalars"], strict=True)
                for name in theirs | ours
            ),
            "gradients": [
                difference(*pair) for pair in zip(found["gradients"], expected["gradients"], strict=True)
            ],
            "params": difference(found["params"], expected["params"]),
            **{name: found[name] for name in ("compiled", "shapes", "kernel_share", "rows_share")},
        }
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main(sys.argv[1], sys.argv[2], sys.argv[3], *(int(argument) for argument in sys.argv[4:-3]))
