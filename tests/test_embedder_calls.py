"""What callers hand to the library, and what they can ask of it."""

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas
import pytest
from flax import nnx
from helpers.compiles import lowered_programs
from helpers.tiny_models import byte_tokenizer

from search_r3_jax import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model
from search_r3_jax.mesh import make_mesh
from search_r3_jax.precision import quantize
from search_r3_jax.text.prompts import Mode

TEXTS = ["a query", "another, much longer query about something", "x"]


@pytest.fixture(scope="module")
def embedder(tiny_model: LoadedModel) -> Embedder:
    return Embedder(tiny_model, max_tokens=48, max_think_tokens=5)


@pytest.mark.parametrize("mode", ["direct", "reason"])
@pytest.mark.parametrize(
    "form",
    [
        tuple,
        np.array,
        lambda texts: np.array(texts, object),
        pandas.Series,
        lambda texts: pandas.Series(texts, index=[7, 3, 5]),
        lambda texts: (text for text in texts),
        lambda texts: dict.fromkeys(texts).keys(),
    ],
)
def test_texts_may_come_in_any_form(
    embedder: Embedder, mode: Any, form: Callable[[list[str]], Iterable[str]]
) -> None:
    np.testing.assert_array_equal(embedder.encode(form(TEXTS), mode=mode), embedder.encode(TEXTS, mode=mode))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", None], "text 2: None: is missing, no text"),
        (["a", float("nan")], "text 2: nan: is missing"),
        ([pandas.NA], "text 1: <NA>: is of type NAType"),
        ([3], "text 1: 3: is of type int"),
        (["a", "b", b"c"], "text 3: b'c': is of type bytes"),
        ([["a"]], r"text 1: \['a'\]: is of type list"),
        (b"abc", "texts: bytes: give a string"),
        (None, "texts: NoneType: give a string"),
        (4, "texts: int: give a string"),
        ({"text": "a"}, "texts: dict: give a string"),
        ({"a", "b"}, "texts: set: give a string"),
        (pandas.DataFrame({"text": ["a"]}), "texts: DataFrame: give a string, or a list or one column"),
        (np.array("abc"), "texts: ndarray: give a string"),
        (np.array([["a"]]), "texts: ndarray: give a string"),
        (["a", "b \ud83d"], r"text 2: '\\ud83d' at character 3: half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("call", ["encode", "think", "encode_query", "encode_document"])
def test_what_is_no_text_is_named(embedder: Embedder, call: str, texts: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        getattr(embedder, call)(texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"truncate_dim": 8.0}, "truncate_dim: 8.0: give a whole number, 1 or more"),
        ({"truncate_dim": True}, "truncate_dim: True: give a whole number"),
        ({"truncate_dim": 0}, "truncate_dim: 0: give a whole number, 1 or more"),
        ({"batch_size": "8"}, "batch_size: '8': give a whole number"),
        (
            {"mode": "reason", "max_think_tokens": 2.5},
            "max_think_tokens: 2.5: give a whole number",
        ),
        (
            {"mode": "reason", "max_think_tokens": 10**6},
            "max_think_tokens: 1000000: with the prompt",
        ),
    ],
)
def test_arguments_are_checked(embedder: Embedder, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        embedder.encode(TEXTS, **arguments)


def test_a_query_leaves_room_for_the_thought(tiny_model: LoadedModel) -> None:
    """Within the positions that the model knows."""
    positions = tiny_model.decoder.config.max_positions
    reason = tiny_model.prompter().reason
    embedder = Embedder(tiny_model, max_tokens=10**6, max_think_tokens=20)
    around = len(reason.prefix) + len(reason.suffix) + len(reason.closing) + 20
    long = "a" * (2 * positions)
    np.testing.assert_array_equal(
        embedder.think(long).vector, embedder.think(long[: positions - around]).vector
    )


def test_vectors_of_fewer_bits_have_no_cosines(embedder: Embedder) -> None:
    signs = embedder.encode(TEXTS, precision="binary")
    with pytest.raises(UserError, match="queries: int8: give vectors of precision float32"):
        embedder.similarity(signs, signs)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"mode": "reason"}])
def test_the_text_without_an_embedding_is_named_by_its_place(
    tiny_folders: dict[str, Path], options: dict[str, Any]
) -> None:
    broken = load_model(tiny_folders["qwen2"])
    token = broken.prompter().text_ids(["Z"], 9)[0][-1]
    broken.decoder.embedding.set_value(broken.decoder.embedding[...].at[token].set(np.nan))
    texts = [f"text {i} " + "a" * (i % 7) for i in range(20)]
    texts[12] = "bad Z here"
    with pytest.raises(UserError) as caught:
        Embedder(broken, max_tokens=40, max_think_tokens=2).encode(texts, **options)
    named = re.match(r"text (\d+)", str(caught.value))
    assert named is not None
    number = int(named[1])
    assert repr(texts[number - 1])[1:8] in str(caught.value)
    if options.get("mode") != "reason":
        assert number == 13


def test_half_of_a_surrogate_pair_alone_is_named(embedder: Embedder) -> None:
    with pytest.raises(UserError, match="text 1: "):
        embedder.encode("\ud83d")


def test_the_names_of_sentence_transformers(embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.encode_query(TEXTS), embedder.encode(TEXTS))
    np.testing.assert_array_equal(
        embedder.encode_query(TEXTS, mode="reason"), embedder.encode(TEXTS, mode="reason")
    )
    np.testing.assert_array_equal(embedder.encode_document(TEXTS), embedder.encode(TEXTS, kind="document"))


@pytest.mark.slow
def test_a_batch_size_bounds_what_is_read_together(embedder: Embedder) -> None:
    texts = [f"{text} {i}" for i in range(7) for text in TEXTS]
    for mode in ("direct", "reason"):
        np.testing.assert_allclose(
            embedder.encode(texts, mode=mode, batch_size=4), embedder.encode(texts, mode=mode), atol=1e-6
        )
    with pytest.raises(UserError, match="batch_size: 0: give a whole number, 1 or more"):
        embedder.encode(texts, batch_size=0)


def test_a_budget_for_one_call(embedder: Embedder, tiny_model: LoadedModel) -> None:
    closing = len(tiny_model.prompter().reason.closing)
    short, long = embedder.think(TEXTS, max_think_tokens=2), embedder.think(TEXTS, max_think_tokens=9)
    assert all(thought.tokens <= 2 + closing for thought in short)
    assert max(thought.tokens for thought in long) > 5 + closing
    other = Embedder(tiny_model, max_tokens=48, max_think_tokens=2)
    np.testing.assert_array_equal(
        embedder.encode(TEXTS, mode="reason", max_think_tokens=2), other.encode(TEXTS, mode="reason")
    )
    with pytest.raises(UserError, match="max_think_tokens: nothing is thought in mode 'direct'"):
        embedder.encode(TEXTS, max_think_tokens=2)
    with pytest.raises(UserError, match="max_think_tokens: -1"):
        embedder.think(TEXTS, max_think_tokens=-1)


def test_precision_is_that_of_the_whole_call(embedder: Embedder) -> None:
    for precision in ("int8", "binary"):
        np.testing.assert_array_equal(
            embedder.encode(TEXTS, precision=precision), quantize(embedder.encode(TEXTS), precision)
        )
    assert embedder.encode(TEXTS[0], precision="ubinary").dtype == np.uint8
    with pytest.raises(UserError, match="precision: int8: one vector has no range"):
        embedder.encode(TEXTS[0], precision="int8")


def test_texts_that_are_cut_are_said(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "search_r3_jax"):
        embedder.encode(TEXTS)
        assert caplog.messages == []
        embedder.encode(["word " * 99, *TEXTS])
        embedder.think("word " * 99)
    assert caplog.messages == [
        "1 of 4 texts cut to 48 tokens (max_tokens)",
        "1 of 1 texts cut to 48 tokens (max_tokens)",
    ]


def test_a_model_that_was_never_trained_says_so(
    tiny_folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from search_r3_jax.hub.export import export_model

    untrained = shutil.copytree(tiny_folders["llama"], tmp_path / "untrained")
    byte_tokenizer().save_pretrained(untrained)
    Embedder.load(untrained, max_tokens=20)
    assert "the model has never learnt its embed token" in caplog.text
    caplog.clear()
    Embedder.load(export_model(load_model(tiny_folders["llama"]), tmp_path / "export"))
    assert caplog.text == ""


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.slow
def test_parameters_in_half_precision(tiny_folders: dict[str, Path], family: str) -> None:
    """As if the checkpoint had been stored in bfloat16, which is what most are."""
    whole = Embedder.load(tiny_folders[family], max_tokens=40)
    half = Embedder.load(tiny_folders[family], max_tokens=40, param_dtype="bfloat16")
    sizes = {x.dtype.name for x in jax.tree.leaves(half._state) if x.ndim > 2}
    assert sizes == {"bfloat16"}
    cosines = np.sum(half.encode(TEXTS) * whole.encode(TEXTS), axis=-1)
    assert cosines.min() > 0.999
    assert cosines.max() < 1 - 1e-9
    rounded = load_model(tiny_folders[family])
    params = nnx.state(rounded.decoder)
    nnx.update(
        rounded.decoder, jax.tree.map(lambda x, y: x.astype(y.dtype).astype(x.dtype), params, half._state)
    )
    np.testing.assert_allclose(half.encode(TEXTS), Embedder(rounded, max_tokens=40).encode(TEXTS), atol=1e-6)


@pytest.mark.slow
def test_devices_share_the_texts(tiny_folders: dict[str, Path], embedder: Embedder) -> None:
    mesh = make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    shared = Embedder.load(tiny_folders["llama"], max_tokens=48, max_think_tokens=5, mesh=mesh)
    for mode in ("direct", "reason"):
        np.testing.assert_allclose(
            shared.encode(TEXTS, mode=mode), embedder.encode(TEXTS, mode=mode), atol=1e-6
        )


LISTS = (2, 3, 5, 12, 24)


Call = tuple[Mode, list[str]]


def mixed_calls(direct: int, listed: int, thought: int, *, seed: int) -> list[Call]:
    """Calls in a random order: `direct` single texts of 1 to 64 words, `listed` lists of each of `LISTS`, a
    third of them thought about, and `thought` single queries."""
    generator = np.random.default_rng(seed)

    def texts(count: int) -> list[str]:
        return [" ".join(["word"] * int(generator.integers(1, 65))) for _ in range(count)]

    modes: tuple[Mode, ...] = ("direct", "direct", "reason")
    calls: list[Call] = [("direct", [" ".join(["word"] * n)]) for n in range(1, direct + 1)]
    calls.extend((modes[i % 3], texts(size)) for size in LISTS for i in range(listed))
    calls.extend(("reason", texts(1)) for _ in range(thought))
    return [calls[i] for i in generator.permutation(len(calls))]


@pytest.mark.slow
def test_mixed_calls_need_few_programs(tiny_folders: dict[str, Path]) -> None:
    embedder = Embedder.load(tiny_folders["llama"], max_tokens=200, max_think_tokens=3, warm_up=True)
    with lowered_programs() as single:
        embedder.encode("a single text " * 3)
        embedder.encode(["some", "texts of this and that"])
        embedder.think("a single query")
    assert single == []
    with lowered_programs() as names:
        for mode, texts in mixed_calls(16, 3, 4, seed=0):
            embedder.encode(texts, mode=mode)
    assert len(names) <= 7


@pytest.mark.slow
@pytest.mark.exhaustive
def test_150_mixed_calls_of_the_packaged_model_need_few_programs(optimised: None) -> None:
    # A short budget: the programs are as many, and end sooner.
    embedder = Embedder.load("smollm2", max_think_tokens=4, warm_up=True)
    calls = mixed_calls(64, 12, 26, seed=0)
    assert len(calls) == 150
    with lowered_programs() as names:
        for mode, texts in calls:
            embedder.encode(texts, mode=mode)
    print(f"{len(names)} programs: {sorted(names)}")
    assert len(names) <= 12
