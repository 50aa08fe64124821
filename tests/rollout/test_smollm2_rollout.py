"""The sampler on SmolLM2, whose logits reach 40: what cached decoding shares with the trainer's own forward,
and what it cannot."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import plain_hidden

from search_r3_jax.config import LoraConfig, OptimizerConfig, RlConfig, SamplerConfig
from search_r3_jax.hub.load_model import LoadedModel, with_lora
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.monitor import log_prob_mismatch
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.rl_step import make_batch, make_scorer, make_update
from search_r3_jax.training.state import init_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]
TEXTS = [
    "how do plants make sugar",
    "sort a list of tuples by their second element in python",
    "who wrote the origin of species",
    "effects of vitamin d deficiency on bone density in older adults",
]
N, G, TOKENS = len(TEXTS), 4, 32


def test_embedding_ratio_and_tokens_against_the_trainers_forward(smollm2: LoadedModel) -> None:
    model = with_lora(smollm2, LoraConfig(rank=4), seed=0)
    prompter = Prompter(model.tokenizer)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    generator = np.random.default_rng(0)
    # Adapters that do something.
    params = jax.tree.map(lambda x: x + 0.01 * generator.standard_normal(x.shape).astype(np.float32), params)
    whole = nnx.merge_state(params, frozen)
    full_graph = nnx.split(model.decoder)[0]
    sampler = Sampler(full_graph, prompter, SamplerConfig(max_think_tokens=TOKENS, temperature=1.0))
    rollout = sampler.sample(whole, TEXTS, rollout_seeds(0, 0, range(N), G), max_tokens=32)
    assert rollout.sampled.sum() > N * G * TOKENS / 2

    # Two of the queries alone: the same tokens, though another shape of the batch rounds otherwise.
    alone = sampler.sample(whole, TEXTS[2:4], rollout_seeds(0, 0, [2, 3], G), max_tokens=32)
    np.testing.assert_array_equal(alone.ids, rollout.ids[2 * G : 4 * G])

    # The embedding of whole rows in plain forwards.
    rows = [
        [*prompter.reason.prefix, *prompter.reason_rows([TEXTS[b // G]], 32)[0], *reply]
        for b, reply in enumerate(rollout.replies())
        if b % G == 0
    ]
    hidden = np.asarray(plain_hidden(nnx.merge(full_graph, whole), rows)).astype(np.float64)
    last = np.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    np.testing.assert_allclose(
        rollout.vectors[::G], last / np.linalg.norm(last, axis=-1, keepdims=True), atol=1e-5
    )

    documents = generator.standard_normal((N, model.decoder.config.hidden_size))
    documents /= np.linalg.norm(documents, axis=-1, keepdims=True)
    batch = make_batch(rollout, generator.standard_normal(N * G), documents, np.eye(N))
    config = RlConfig(
        beta=0.0,
        sampler=SamplerConfig(max_think_tokens=TOKENS),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    scored = make_scorer(graph, prompter, config)(params, frozen, batch.replies, adapters=True)
    # Hidden states of two orders of addition differ by 1.5e-6 of their size, times logits of 40; the head's
    # own sums add as much again.
    rounding = log_prob_mismatch(
        np.asarray(scored).reshape(rollout.ids.shape), rollout.log_probs, rollout.sampled
    )
    assert 1 - 1e-4 < rounding["sampler_ratio_min"] < rounding["sampler_ratio_max"] < 1 + 1e-4

    # Of the trainer's own forward, compiled without a gradient, the update's is the same to the last digits.
    optimizer = make_optimizer(config.optimizer, 6)
    _, scalars, _ = make_update(graph, prompter, optimizer, config)(
        init_state(params, optimizer), frozen, batch, scored
    )
    assert abs(float(scalars["ratio_min"]) - 1) <= 1e-5
    assert abs(float(scalars["ratio_max"]) - 1) <= 1e-5
