"""The public library against plain forwards of the same decoder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import plain_hidden

from search_r3_jax import Embedder, Thought, console
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.text.prompts import CLOSING, Prompter

TEXTS = ["a query", "", "another, much longer query about something", "x", "a query", "word " * 60]
MAX_TOKENS, BUDGET = 48, 7


@pytest.fixture(scope="module")
def embedder(tiny_model: LoadedModel) -> Embedder:
    return Embedder(tiny_model, max_tokens=MAX_TOKENS, max_think_tokens=BUDGET)


@pytest.fixture(scope="module")
def thoughts(embedder: Embedder) -> list[Thought]:
    return embedder.think(TEXTS)


def last_states(model: LoadedModel, rows: list[list[int]]) -> np.ndarray:
    """Unit vectors [N,E] float64 of the last token of whole rows."""
    hidden = np.asarray(plain_hidden(model.decoder, rows)).astype(np.float64)
    last = np.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    return last / np.linalg.norm(last, axis=-1, keepdims=True)


def test_the_package_loads_without_jax_until_the_embedder_is_asked_for() -> None:
    code = (
        "import sys, search_r3_jax; assert not {'jax', 'transformers', 'numpy'} & sys.modules.keys(), "
        "'heavy';"
        "from search_r3_jax import Embedder; assert 'jax' in sys.modules; print(Embedder.__name__)"
    )
    # Without torch, as most users are, transformers would say so.
    without_torch = str(Path(__file__).parent / "helpers" / "without_torch")
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": without_torch},
    )
    assert shown.stdout == "Embedder\n", shown.stderr
    assert shown.stderr == ""


def test_direct_vectors_equal_a_plain_forward(embedder: Embedder, tiny_model: LoadedModel) -> None:
    prompter = Prompter(tiny_model.tokenizer)
    expected = last_states(
        tiny_model, [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(TEXTS, MAX_TOKENS)]
    )
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_array_equal(embedder.encode(TEXTS, kind="document"), vectors)


def test_many_texts_come_back_in_their_order(embedder: Embedder, tiny_model: LoadedModel) -> None:
    generator = np.random.default_rng(0)
    texts = ["ab " * int(count) + str(i) for i, count in enumerate(generator.integers(0, 30, 150))]
    prompter = Prompter(tiny_model.tokenizer)
    expected = last_states(
        tiny_model, [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(texts, MAX_TOKENS)]
    )
    np.testing.assert_allclose(embedder.encode(texts), expected, atol=1e-5)


def test_thoughts_are_greedy_and_end_in_the_embedding_of_a_plain_forward(
    embedder: Embedder, thoughts: list[Thought], tiny_model: LoadedModel
) -> None:
    """Teacher-forced: each token was the best one, until the budget ran out and the closing was forced."""
    prompter = Prompter(tiny_model.tokenizer)
    for text, thought in zip(TEXTS, thoughts, strict=True):
        row = [*prompter.reason.prefix, *prompter.reason_rows([text], MAX_TOKENS)[0]]
        reply: list[int] = []
        while len(reply) < BUDGET and (not reply or reply[-1] not in (prompter.embed_id, *prompter.end_ids)):
            hidden = plain_hidden(tiny_model.decoder, [row + reply])[0, len(row) + len(reply) - 1]
            reply.append(int(np.argmax(np.asarray(tiny_model.decoder.logits(hidden)))))
        assert thought.valid == (reply[-1] == prompter.embed_id)
        if not thought.valid:
            reply += prompter.reason.closing
        assert thought.tokens == len(reply)
        assert thought.text == str(embedder.tokenizer.decode(reply)).strip().removesuffix(CLOSING).strip()
        assert CLOSING not in thought.text
        np.testing.assert_allclose(thought.vector, last_states(tiny_model, [row + reply])[0], atol=1e-5)


def test_a_thought_does_not_depend_on_its_batch(embedder: Embedder, thoughts: list[Thought]) -> None:
    alone = embedder.think(TEXTS[2])
    assert isinstance(alone, Thought)
    assert alone.text == thoughts[2].text
    np.testing.assert_allclose(alone.vector, thoughts[2].vector, atol=1e-6)
    np.testing.assert_array_equal(
        embedder.encode(TEXTS, mode="reason"), np.stack([thought.vector for thought in thoughts])
    )


def test_one_text_none_and_the_empty_one(embedder: Embedder) -> None:
    E = embedder.dimension
    assert embedder.encode(TEXTS[0]).shape == (E,)
    np.testing.assert_allclose(embedder.encode(TEXTS[0]), embedder.encode(TEXTS)[0], atol=1e-6)
    for mode in ("direct", "reason"):
        empty = embedder.encode([], mode=mode)
        assert empty.shape == (0, E)
        assert empty.dtype == np.float32
    assert embedder.think([]) == []
    np.testing.assert_allclose(np.linalg.norm(embedder.encode(["", "  \n"]), axis=-1), 1.0, atol=1e-6)


def test_truncation_cuts_and_normalises_again(embedder: Embedder) -> None:
    whole = embedder.encode(TEXTS).astype(np.float64)[:, :10]
    cut = embedder.encode(TEXTS, truncate_dim=10)
    assert cut.dtype == np.float32
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole, axis=-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(cut[0], cut), [cut @ cut[0]], atol=1e-6)
    for wrong in (0, embedder.dimension + 1):
        with pytest.raises(UserError, match="truncate_dim"):
            embedder.encode(TEXTS, truncate_dim=wrong)


def test_documents_do_not_think(embedder: Embedder) -> None:
    with pytest.raises(UserError, match="mode: documents are embedded directly"):
        embedder.encode(TEXTS, kind="document", mode="reason")


def test_a_model_lends_no_more_tokens_than_it_has_positions(
    tiny_model: LoadedModel, tiny_folders: dict[str, Path]
) -> None:
    prompter = Prompter(tiny_model.tokenizer)
    around = len(prompter.direct.prefix) + len(prompter.direct.suffix) + len(prompter.direct.closing)
    embedder = Embedder.load(tiny_folders["llama"], max_tokens=10_000)
    assert embedder.max_tokens == tiny_model.decoder.config.max_positions - around
    assert Embedder.load(tiny_folders["llama"], max_tokens=20).max_tokens == 20


def test_progress_is_plain_lines_where_there_is_no_terminal(
    embedder: Embedder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)
    embedder.encode(TEXTS)
    assert capsys.readouterr().err == ""
    embedder.encode(TEXTS, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"texts {len(TEXTS)}/{len(TEXTS)}" in shown.err.splitlines()[-1]
    assert "left" in shown.err
