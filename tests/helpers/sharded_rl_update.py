"""A program for tests: an update of stage 2 on meshes of all devices, beside that of one device; prints JSON.

Arguments: folder of a model, "lora" or "full", a JSON list of triples: queries of a micro-batch, sizes of a
mesh, the share of the weights that a device may have while replies are written (0: all).
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.sharded_sft_steps import difference, keep_gradient, whole
from helpers.tiny_models import word_collection
from jax.sharding import Mesh

from search_r3_jax.chips import CHIPS
from search_r3_jax.config import InfoNceConfig, LoraConfig, RlConfig, SamplerConfig
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.mesh import make_mesh
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.rollout import sampler as sampler_module
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.rl_step import make_batch, make_scorer, make_update, put_batch, tokenize_documents
from search_r3_jax.training.state import init_state, state_shardings

Q, G = 32, 2


def update(
    folder: str, *, lora: bool, mesh: Mesh | None, micro_queries: int, share: float = 0.0
) -> dict[str, Any]:
    """What is sampled, the scalars and the gradient of one update on it."""
    sampling = SamplerConfig(max_think_tokens=8)
    config = RlConfig(
        global_queries=Q,
        group_size=G,
        sampler=sampling,
        importance_cap=2.0,
        infonce=InfoNceConfig(train_documents=True),
    )
    model = with_lora(load_model(folder, remat="dots", mesh=mesh), LoraConfig(rank=4 if lora else 0), seed=0)
    prompter = Prompter(model.tokenizer)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    start = params
    # The policy has moved from its reference.
    generator = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: 0.02 * generator.standard_normal(x.shape).astype(np.float32), params)
    params = jax.jit(lambda params: jax.tree.map(lambda x, more: x + more, params, noise))(params)
    shardings = None if mesh is None else state_shardings(params, keep_gradient(), mesh)
    state = init_state(params, keep_gradient(), shardings)

    texts = [query.text for query in word_collection(documents=Q, queries=Q).queries]
    if share > 0:
        size = sum(4 * x.size for x in jax.tree.leaves(nnx.state(model.decoder)))
        # A chip so small that it has to share the weights with neighbours.
        sampler_module.chip_of = lambda kind: dataclasses.replace(
            CHIPS["v5e"], hbm=share * size / sampler_module.MOST_OF_MEMORY
        )
    sampler = Sampler(
        nnx.split(model.decoder)[0], prompter, SamplerConfig(max_think_tokens=8, temperature=1.0), mesh=mesh
    )
    rollout = sampler.sample(
        nnx.merge_state(state.params, frozen), texts, rollout_seeds(0, 0, range(Q), G), max_tokens=16
    )
    rewards = jnp.asarray(generator.random(Q * G).astype(np.float32))
    advantages, _ = group_advantages(rewards, jnp.repeat(jnp.arange(Q), G), groups=Q)
    documents = generator.standard_normal((Q + 8, 64))
    documents /= np.linalg.norm(documents, axis=-1, keepdims=True)
    own = tokenize_documents(prompter, texts, 16)
    batch = make_batch(
        rollout, np.asarray(advantages), documents, np.eye(Q, Q + 8), trained=own, micro_queries=micro_queries
    )
    batch = put_batch(batch, mesh)
    score = make_scorer(graph, prompter, config, shardings)
    # Full fine-tuning keeps the parameters that it began with, adapters their base.
    reference = score(start, frozen, batch.replies, adapters=not lora)
    function = make_update(graph, prompter, keep_gradient(), config, shardings)
    after, scalars, _ = function(state, frozen, batch, None, reference)
    assert shardings is None or jax.tree.map(lambda x: x.sharding, after) == shardings
    local: Any = batch.replies.ids
    return {
        "ids": rollout.ids,
        "vectors": rollout.vectors,
        "scalars": {name: float(value) for name, value in scalars.items()},
        "gradient": whole(after.optimizer[0].trace, mesh),
        "rows_share": 1.0 if mesh is None else local.addressable_shards[0].data.size / local.size,
    }


def main(folder: str, kind: str, cases: str) -> None:
    lora = kind == "lora"
    report: dict[str, Any] = {"devices": jax.device_count()}
    alone = functools.cache(
        lambda micro_queries: update(folder, lora=lora, mesh=None, micro_queries=micro_queries)
    )
    for micro_queries, sizes, share in json.loads(cases):
        expected = alone(micro_queries)
        found = update(folder, lora=lora, mesh=make_mesh(**sizes), micro_queries=micro_queries, share=share)
        scalars = zip(found["scalars"].items(), expected["scalars"].items(), strict=True)
        report[f"{micro_queries} {json.dumps(sizes)} {share}"] = {
            "same_tokens": bool((found["ids"] == expected["ids"]).all()),
            "vectors": float(np.abs(found["vectors"] - expected["vectors"]).max()),
            "scalars": max(abs(ours - theirs) / max(1.0, abs(theirs)) for (_, ours), (_, theirs) in scalars),
            "kl": expected["scalars"]["kl"],
            "gradient": difference(found["gradient"], expected["gradient"]),
            "rows_share": found["rows_share"],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:4])
