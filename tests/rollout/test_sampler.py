"""The sampler against teacher-forced forwards of the same decoder: one pass, same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import plain_hidden

from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter

TEXTS = ["a query", "another, much longer query about something", "x"]
G, BUDGET = 4, 9


def sampled(model: LoadedModel, temperature: float, seed: int = 0) -> Rollout:
    graph, state = nnx.split(model.decoder)
    sampler = Sampler(graph, Prompter(model.tokenizer), max_think_tokens=BUDGET, temperature=temperature)
    return sampler.sample(state, TEXTS, rollout_seeds(seed, 5, range(len(TEXTS)), G), max_tokens=64)


def whole_rows(model: LoadedModel, replies: list[list[int]], group: int = G) -> tuple[np.ndarray, list[int]]:
    """Hidden states of prefix, prompt and reply in plain forwards, and where each reply begins."""
    prompter = Prompter(model.tokenizer)
    prompts = [[*prompter.reason.prefix, *prompter.reason_rows([TEXTS[b // group]], 64)[0]] for b in range(len(replies))]
    hidden = plain_hidden(model.decoder, [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])
    return np.asarray(hidden), [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_embedding_and_log_probs_equal_a_teacher_forced_forward(tiny_model: LoadedModel, temperature: float) -> None:
    rollout = sampled(tiny_model, temperature)
    hidden, starts = whole_rows(tiny_model, rollout.replies())
    logits = np.asarray(tiny_model.decoder.logits(jnp.asarray(hidden))).astype(np.float64) / temperature
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    for b, reply in enumerate(rollout.replies()):
        state = hidden[b, starts[b] + len(reply) - 1].astype(np.float64)
        np.testing.assert_allclose(rollout.vectors[b], state / np.linalg.norm(state), atol=1e-5)
        for t, token in enumerate(reply):
            if rollout.sampled[b, t]:
                np.testing.assert_allclose(rollout.log_probs[b, t], log_probs[b, starts[b] + t - 1, token], atol=1e-5)
            else:
                assert rollout.log_probs[b, t] == 0.0


def test_every_reply_ends_with_the_one_embed_token_and_forced_ones_are_not_valid(tiny_model: LoadedModel) -> None:
    rollout = sampled(tiny_model, 1.0)
    closing = list(Prompter(tiny_model.tokenizer).reason.closing)
    for b, reply in enumerate(rollout.replies()):
        assert reply.count(tiny_model.embed_id) == 1
        assert reply[-1] == tiny_model.embed_id
        own = int(rollout.sampled[b].sum())
        assert own <= BUDGET
        assert rollout.valid[b] == (own == len(reply))
        if not rollout.valid[b]:
            assert reply[own:] == closing


def test_same_seed_same_reply_other_seed_other_reply(tiny_model: LoadedModel) -> None:
    first, again, other = sampled(tiny_model, 1.0), sampled(tiny_model, 1.0), sampled(tiny_model, 1.0, seed=1)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert (first.ids != other.ids).any()
    assert len({tuple(reply) for reply in first.replies()[:G]}) > 1


def test_samples_follow_the_models_distribution(tiny_model: LoadedModel) -> None:
    """First tokens of many samples: chi-square-like distance to the probabilities of a plain forward."""
    graph, state = nnx.split(tiny_model.decoder)
    sampler = Sampler(graph, Prompter(tiny_model.tokenizer), max_think_tokens=1, temperature=1.0)
    n = 4000
    rollout = sampler.sample(state, TEXTS[:1], rollout_seeds(3, 0, [0], n), max_tokens=64)
    hidden, starts = whole_rows(tiny_model, [[]])
    logits = np.asarray(tiny_model.decoder.logits(jnp.asarray(hidden[0, starts[0] - 1]))).astype(np.float64)
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    counts = np.bincount(rollout.ids[:, 0], minlength=len(expected))
    big = expected * n >= 5
    statistic = ((counts[big] - expected[big] * n) ** 2 / (expected[big] * n)).sum()
    # Mean of chi-square is its degrees of freedom, its deviation the root of twice that.
    assert abs(statistic - big.sum()) < 5 * np.sqrt(2 * big.sum())


def test_the_encoder_equals_a_plain_forward_in_any_batch(tiny_model: LoadedModel) -> None:
    graph, state = nnx.split(tiny_model.decoder)
    prompter = Prompter(tiny_model.tokenizer)
    texts = [TEXTS[i % 3] * (1 + i % 5) for i in range(17)]
    vectors = Encoder(graph, prompter, batch_tokens=256).encode(state, texts, max_tokens=40)
    rows = [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(texts, 40)]
    hidden = np.asarray(plain_hidden(tiny_model.decoder, rows)).astype(np.float64)
    last = np.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    np.testing.assert_allclose(vectors, last / np.linalg.norm(last, axis=-1, keepdims=True), atol=1e-5)
