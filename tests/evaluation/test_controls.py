"""Controls of reasoning: teacher forcing gives the sampler's vectors, and each control is what its name
says."""

from typing import Any

import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import plain_hidden, word_collection

from search_r3_jax.config import SamplerConfig, TextConfig
from search_r3_jax.evaluation.controls import (
    CONTROLS,
    control_replies,
    corpus_words,
    derangement,
    thought_tokens,
)
from search_r3_jax.evaluation.evaluate import Evaluator
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter

TEXTS = ["a query", "another, much longer query about something", "x", "sort a list", "ÄÖ ∀x"]
WORDS = ["alpha", "beta", "gamma", "delta"]


@pytest.fixture(scope="module")
def parts(tiny_model: LoadedModel) -> tuple[nnx.GraphDef[Any], nnx.State, Prompter]:
    graph, state = nnx.split(tiny_model.decoder)
    return graph, state, Prompter(tiny_model.tokenizer)


@pytest.mark.parametrize(("budget", "temperature"), [(0, 0.0), (9, 0.0), (9, 1.0), (70, 1.0)])
@pytest.mark.slow
def test_teacher_forcing_gives_the_samplers_vectors(
    parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter], budget: int, temperature: float
) -> None:
    graph, state, prompter = parts
    seeds = rollout_seeds(0, 1, range(len(TEXTS)), 3)
    rollout = Sampler(
        graph, prompter, SamplerConfig(max_think_tokens=budget, temperature=temperature)
    ).sample(state, TEXTS, seeds, max_tokens=20)
    repeated = [text for text in TEXTS for _ in range(3)]
    # Small batches, so that rows of several lengths and fillers occur.
    encoder = ReasonedEncoder(graph, prompter, pass_tokens=256)
    np.testing.assert_allclose(
        encoder.encode(state, repeated, rollout.replies(), max_tokens=20), rollout.vectors, atol=1e-5
    )


def test_reasoning_given_as_text_is_what_a_plain_forward_of_the_whole_row_gives(
    tiny_model: LoadedModel, parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter]
) -> None:
    graph, state, prompter = parts
    replies = [
        prompter.thought_ids(text) for text in ("short", "a thought, and a second one", "", "x" * 60, "y z")
    ]
    vectors = ReasonedEncoder(graph, prompter).encode(state, TEXTS, replies, max_tokens=12)
    rows = [
        [*prompter.reason.prefix, *prompter.text_ids([text], 12)[0], *prompter.reason.suffix, *reply]
        for text, reply in zip(TEXTS, replies, strict=True)
    ]
    hidden = np.asarray(plain_hidden(tiny_model.decoder, rows)).astype(np.float64)
    last = np.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    np.testing.assert_allclose(vectors, last / np.linalg.norm(last, axis=-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("reply", [[], [5, 6], "twice", "inside"])
def test_a_reply_that_is_not_closed_is_refused(
    parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter], reply: list[int] | str
) -> None:
    graph, state, prompter = parts
    wrong = {"twice": [prompter.embed_id, 5, prompter.embed_id], "inside": [prompter.embed_id, 5]}
    given = wrong[reply] if isinstance(reply, str) else reply
    with pytest.raises(ValueError, match="reply 1 does not end with its only embed token"):
        ReasonedEncoder(graph, prompter).encode(
            state, TEXTS[:2], [prompter.thought_ids("a"), given], max_tokens=12
        )


@pytest.mark.parametrize("group", [1, 3])
def test_each_control_is_what_its_name_says(
    parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter], group: int
) -> None:
    _, _, prompter = parts
    closing, generator = list(prompter.reason.closing), np.random.default_rng(group)
    thoughts = [
        generator.integers(5, 200, generator.integers(0, 40)).tolist() for _ in range(len(TEXTS) * group)
    ]
    # A reply may also end with the embed token alone, where the model wrote it without the closing words.
    replies = [thought + (closing if b % 2 else closing[-1:]) for b, thought in enumerate(thoughts)]
    found = control_replies(prompter, TEXTS, replies, WORDS, seed=3, step=7)
    assert list(found) == list(CONTROLS)
    assert found["own"] == replies
    assert found["empty"] == [closing] * len(replies)
    other = derangement(len(TEXTS), 3, 7)
    plain = prompter.tokenizer.decode
    for b, thought in enumerate(thoughts):
        query, sample = divmod(b, group)
        assert found["swapped"][b] == replies[int(other[query]) * group + sample]
        assert thought_tokens(prompter, replies[b]) == len(thought)
        for name in ("repeated", "random"):
            assert found[name][b][len(thought) :] == closing
        again = prompter.tokenizer(" ".join([TEXTS[query]] * 50), add_special_tokens=False)["input_ids"]
        assert found["repeated"][b][: len(thought)] == again[: len(thought)]
        written = str(plain(found["random"][b][: len(thought)])).split()
        assert all(word in WORDS for word in written[:-1])
        assert not written or any(word.startswith(written[-1]) for word in WORDS)
    drawn = {str(plain(reply)) for reply in found["random"]}
    assert len(drawn) > len(replies) // 2
    assert control_replies(prompter, TEXTS, replies, WORDS, seed=3, step=7) == found
    assert control_replies(prompter, TEXTS, replies, WORDS, seed=4, step=7)["random"] != found["random"]


def test_controls_need_two_queries_words_and_whole_groups(
    parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter],
) -> None:
    prompter = parts[2]
    closing = list(prompter.reason.closing)
    with pytest.raises(ValueError, match="nobody"):
        control_replies(prompter, TEXTS[:1], [closing], WORDS, seed=0)
    with pytest.raises(ValueError, match="and words"):
        control_replies(prompter, TEXTS[:2], [closing] * 2, [], seed=0)
    with pytest.raises(ValueError, match="multiple"):
        control_replies(prompter, TEXTS[:2], [closing] * 3, WORDS, seed=0)


@pytest.mark.slow
def test_controls_of_an_evaluation_are_those_of_its_own_replies(
    parts: tuple[nnx.GraphDef[Any], nnx.State, Prompter],
) -> None:
    graph, state, prompter = parts
    collection = word_collection(documents=20, queries=9, split="test")
    text = TextConfig(max_query_tokens=16)
    thinking, at_once = (
        Evaluator(graph, prompter, text, SamplerConfig(max_think_tokens=budget)) for budget in (12, 0)
    )
    reasoned = thinking.reasoned_queries(state, collection)
    found = thinking.control_queries(state, collection, reasoned, seed=5)
    np.testing.assert_allclose(found["own"].vectors, reasoned.vectors, atol=1e-5)
    np.testing.assert_allclose(
        found["empty"].vectors, at_once.reasoned_queries(state, collection).vectors, atol=1e-5
    )
    texts = [query.text for query in collection.queries]
    replies = control_replies(prompter, texts, reasoned.replies, corpus_words(collection), seed=5)
    encoder = ReasonedEncoder(graph, prompter)
    assert list(found) == list(CONTROLS)
    for name, each in found.items():
        np.testing.assert_array_equal(
            each.vectors, encoder.encode(state, texts, replies[name], max_tokens=16)
        )
        assert each.tokens == [len(reply) for reply in replies[name]]
        for other in found:
            assert other == name or np.abs(each.vectors - found[other].vectors).max() > 1e-4


def test_words_of_a_corpus() -> None:
    collection = word_collection(documents=12, queries=2)
    expected = sorted({word for document in collection.documents for word in document.text.split()})
    assert corpus_words(collection) == expected


@pytest.mark.parametrize("count", [2, 3, 8, 61])
def test_nobody_keeps_their_own_reasoning(count: int) -> None:
    seen = set()
    for step in range(40):
        exchanged = derangement(count, 5, step)
        assert sorted(exchanged) == list(range(count))
        assert (exchanged != np.arange(count)).all()
        np.testing.assert_array_equal(exchanged, derangement(count, 5, step))
        seen.add(tuple(exchanged))
    assert len(seen) > (1 if count > 2 else 0)
    with pytest.raises(ValueError, match="nobody"):
        derangement(1, 0, 0)
