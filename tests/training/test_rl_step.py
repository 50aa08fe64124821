"""An update of stage 2 on a tiny model: it sees what the sampler saw, and its gradient is the plain one."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.tiny_models import plain_hidden

from search_r3_jax.config import InfoNceConfig, LoraConfig, OptimizerConfig, RlConfig, SamplerConfig
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.layers import LoraParam
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.rl_step import RlBatch, make_batch, make_scorer, make_update, tokenize_documents
from search_r3_jax.training.state import init_state

LORA = LoraConfig(rank=4)
RL = RlConfig(sampler=SamplerConfig(max_think_tokens=8), optimizer=OptimizerConfig(learning_rate=1e-3))
TEXTS = ["one", "another query", "a third"]


class Prepared(NamedTuple):
    """A model whose adapters do something, one rollout of it and what an update would make of that."""

    model: LoadedModel
    prompter: Prompter
    rollout: Rollout
    batch: RlBatch


def batch_of(rollout: Rollout, *, micro_queries: int = 0, Q: int = 3) -> RlBatch:
    generator = np.random.default_rng(1)
    rewards = generator.random(len(rollout.ids)).astype(np.float32)
    group_id = jnp.repeat(jnp.arange(Q), len(rewards) // Q)
    advantages, _ = group_advantages(jnp.asarray(rewards), group_id, groups=Q)
    documents = generator.standard_normal((Q, 64))
    documents /= np.linalg.norm(documents, axis=-1, keepdims=True)
    return make_batch(
        rollout, np.asarray(advantages), documents, np.eye(Q) + np.eye(Q, k=1), micro_queries=micro_queries
    )


@pytest.fixture(scope="module")
def prepared(tiny_folders: dict[str, Path]) -> Prepared:
    model = with_lora(load_model(tiny_folders["llama"]), LORA, seed=0)
    generator = np.random.default_rng(0)
    params = nnx.state(model.decoder, LoraParam)
    nnx.update(
        model.decoder,
        jax.tree.map(lambda x: x + 0.05 * generator.standard_normal(x.shape).astype(np.float32), params),
    )
    prompter = Prompter(model.tokenizer)
    graph, state = nnx.split(model.decoder)
    sampler = Sampler(graph, prompter, SamplerConfig(max_think_tokens=8, temperature=1.0))
    rollout = sampler.sample(state, TEXTS, rollout_seeds(0, 0, range(3), 4), max_tokens=16)
    return Prepared(model, prompter, rollout, batch_of(rollout))


def plain_log_probs(decoder: Decoder, prepared: Prepared) -> list[jax.Array]:
    """Of each reply's sampled tokens, from whole rows: no shared prompt, no head over chunks."""
    prompts = [[*prepared.prompter.reason.prefix, *row] for row in prepared.prompter.reason_rows(TEXTS, 16)]
    rows = [prompts[b // 4] + reply for b, reply in enumerate(prepared.rollout.replies())]
    log_probs = jax.nn.log_softmax(decoder.logits(plain_hidden(decoder, rows)), axis=-1)
    found = []
    for b, row in enumerate(rows):
        start = len(prompts[b // 4])
        places = start + np.flatnonzero(prepared.rollout.sampled[b])
        found.append(log_probs[b, places - 1, np.array(row)[places]])
    return found


@pytest.mark.slow
def test_step_zero_ratio_is_one_on_every_token(prepared: Prepared) -> None:
    model, prompter, rollout, batch = prepared
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    score = make_scorer(graph, prompter, RL)
    old = score(params, frozen, batch.replies, adapters=True)
    sampled = rollout.sampled
    assert sampled.sum() > 12
    np.testing.assert_allclose(
        np.exp(np.asarray(old).reshape(sampled.shape) - rollout.log_probs)[sampled], 1.0, atol=1e-5
    )
    optimizer = make_optimizer(RL.optimizer, 6)
    reference = score(params, frozen, batch.replies, adapters=False)
    update = make_update(graph, prompter, optimizer, RL)
    _, scalars, log_probs = update(init_state(params, optimizer), frozen, batch, old, reference)
    assert abs(float(scalars["ratio_min"]) - 1) <= 1e-5
    assert abs(float(scalars["ratio_max"]) - 1) <= 1e-5
    np.testing.assert_allclose(log_probs, old, atol=1e-5)
    assert float(scalars["kl"]) > 1e-3


def test_the_reference_is_the_model_without_adapters(
    prepared: Prepared, tiny_folders: dict[str, Path]
) -> None:
    model, prompter, rollout, batch = prepared
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    found = make_scorer(graph, prompter, RL)(params, frozen, batch.replies, adapters=False)
    reference = np.asarray(found).reshape(rollout.ids.shape)
    base = load_model(tiny_folders["llama"]).decoder
    for b, expected in enumerate(plain_log_probs(base, prepared)):
        np.testing.assert_allclose(reference[b, rollout.sampled[b]], expected, atol=2e-5)
    assert not reference[~rollout.sampled].any()


class Kept(NamedTuple):
    """An optimiser's state that is the last gradient."""

    gradient: nnx.State


def keep_gradient() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: Kept(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, Kept(updates)),
    )


def gradient_of(
    prepared: Prepared, config: RlConfig, batch: RlBatch, *, reference: bool = True
) -> tuple[nnx.State, dict[str, jax.Array]]:
    graph, params, frozen = nnx.split(prepared.model.decoder, LoraParam, ...)
    scored = (
        make_scorer(graph, prepared.prompter, config)(params, frozen, batch.replies, adapters=False)
        if reference
        else None
    )
    optimizer = keep_gradient()
    state, scalars, _ = make_update(graph, prepared.prompter, optimizer, config)(
        init_state(params, optimizer), frozen, batch, None, scored
    )
    return state.optimizer.gradient, scalars


def assert_same_gradient(found: nnx.State, expected: nnx.State) -> None:
    norm = float(optax.tree.norm(expected))
    assert norm > 1e-3
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, found, expected))) < 1e-5 * norm


@pytest.mark.slow
def test_gradient_equals_one_row_at_a_time(prepared: Prepared) -> None:
    """Shared prompts, compaction and groups against a loop over whole rows through the same decoder."""
    config = dataclasses.replace(RL, beta=0.0, infonce=InfoNceConfig(weight=0.0))
    graph, params, frozen = nnx.split(prepared.model.decoder, LoraParam, ...)
    gradient, scalars = gradient_of(prepared, config, prepared.batch, reference=False)
    advantages = prepared.batch.replies.advantages.reshape(-1)

    @jax.jit
    def plain(params: nnx.State) -> jax.Array:
        decoder = nnx.merge(graph, params, frozen)
        rows = [
            jnp.mean(jnp.exp(new - jax.lax.stop_gradient(new))) * advantages[b]
            for b, new in enumerate(plain_log_probs(decoder, prepared))
        ]
        return -sum(rows, jnp.zeros(())) / len(rows)

    expected = jax.grad(plain)(params)
    np.testing.assert_allclose(scalars["gradient_norm"], optax.tree.norm(expected), rtol=1e-4)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))) < 1e-4 * float(
        optax.tree.norm(expected)
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_micro_batches_change_nothing(prepared: Prepared, variant: Any) -> None:
    config = dataclasses.replace(RL, variant=variant, infonce=InfoNceConfig(weight=0.3), importance_cap=1.5)
    whole, of_whole = gradient_of(prepared, config, prepared.batch)
    parts, of_parts = gradient_of(prepared, config, batch_of(prepared.rollout, micro_queries=1))
    assert_same_gradient(parts, whole)
    assert of_parts.keys() == of_whole.keys()
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match="micro_queries 2 does not divide 3"):
        batch_of(prepared.rollout, micro_queries=2)


@pytest.mark.slow
def test_the_auxiliary_loss_counts_every_relevant_document(prepared: Prepared) -> None:
    config = dataclasses.replace(RL, beta=0.0, infonce=InfoNceConfig(weight=1.0, temperature=0.1))
    _, scalars = gradient_of(prepared, config, prepared.batch, reference=False)
    documents, relevance = (
        np.asarray(prepared.batch.documents, np.float64),
        prepared.batch.replies.relevance[0],
    )
    losses = []
    for b, vector in enumerate(prepared.rollout.vectors.astype(np.float64)):
        scores = vector @ documents.T / 0.1
        positive = relevance[b // 4] > 0
        negatives = np.exp(scores[~positive]).sum()
        losses.append(
            np.mean([np.log((np.exp(score) + negatives) / np.exp(score)) for score in scores[positive]])
        )
    np.testing.assert_allclose(scalars["infonce"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(scalars["loss"], scalars["policy"] + scalars["infonce"], rtol=1e-6)


@pytest.mark.slow
def test_documents_that_are_trained_have_the_plain_gradient(prepared: Prepared) -> None:
    """The queries' own documents beside two constant ones, against whole rows through the same decoder."""
    bodies, prompter = (
        ["a first document", "the second one, which is longer than it may be, so that it is cut", ""],
        prepared.prompter,
    )
    relevance = np.eye(3, 5) + np.eye(3, 5, k=1)
    documents = np.random.default_rng(2).standard_normal((5, 64))
    documents /= np.linalg.norm(documents, axis=-1, keepdims=True)
    own = tokenize_documents(prompter, bodies, 16)
    config = dataclasses.replace(
        RL, beta=0.0, infonce=InfoNceConfig(weight=1.0, temperature=0.1, train_documents=True)
    )
    nothing = np.zeros(len(prepared.rollout.ids), np.float32)
    whole, parts = (
        make_batch(prepared.rollout, nothing, documents, relevance, trained=own, micro_queries=micro)
        for micro in (0, 1)
    )
    gradient, scalars = gradient_of(prepared, config, whole, reference=False)
    assert_same_gradient(gradient_of(prepared, config, parts, reference=False)[0], gradient)

    graph, params, frozen = nnx.split(prepared.model.decoder, LoraParam, ...)
    prompts = [[*prompter.reason.prefix, *row] for row in prompter.reason_rows(TEXTS, 16)]
    query_rows = [prompts[b // 4] + reply for b, reply in enumerate(prepared.rollout.replies())]
    document_rows = [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(bodies, 16)]

    @jax.jit
    def plain(params: nnx.State) -> jax.Array:
        decoder = nnx.merge(graph, params, frozen)

        def vectors(rows: list[list[int]]) -> jax.Array:
            states = jnp.stack(
                [
                    states_td[len(row) - 1]
                    for states_td, row in zip(plain_hidden(decoder, rows), rows, strict=True)
                ]
            )
            return states / jnp.linalg.norm(states, axis=-1, keepdims=True)

        scores = vectors(query_rows) @ jnp.concatenate([vectors(document_rows), documents[3:]]).T / 0.1
        losses = []
        for b, row in enumerate(scores):
            positive = relevance[b // 4] > 0
            negatives = jnp.sum(jnp.exp(row[~positive]))
            losses.append(jnp.mean(jnp.log(jnp.exp(row[positive]) + negatives) - row[positive]))
        return jnp.mean(jnp.stack(losses))

    loss, expected = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(scalars["infonce"], loss, rtol=1e-5)
    assert_same_gradient(gradient, expected)
    # They are no constants: without their part it is another gradient.
    constant, _ = gradient_of(
        prepared,
        dataclasses.replace(config, infonce=dataclasses.replace(config.infonce, train_documents=False)),
        whole,
        reference=False,
    )
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, constant, expected))) > 0.1 * float(
        optax.tree.norm(expected)
    )


@pytest.mark.slow
def test_an_update_that_is_not_finite_changes_nothing(prepared: Prepared) -> None:
    graph, params, frozen = nnx.split(prepared.model.decoder, LoraParam, ...)
    optimizer = make_optimizer(RL.optimizer, 6)
    update = make_update(graph, prepared.prompter, optimizer, dataclasses.replace(RL, beta=0.0))
    replies = prepared.batch.replies
    broken = prepared.batch._replace(
        replies=replies._replace(advantages=np.full_like(replies.advantages, np.nan))
    )
    before = init_state(params, optimizer)
    state, scalars, _ = update(before, frozen, broken)
    assert int(state.skipped) == int(scalars["skipped_in_a_row"]) == 1
    jax.tree.map(
        np.testing.assert_array_equal, (state.params, state.optimizer), (before.params, before.optimizer)
    )
    state, scalars, _ = update(state, frozen, prepared.batch)
    assert int(scalars["skipped_in_a_row"]) == 0
