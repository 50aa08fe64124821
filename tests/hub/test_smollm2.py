"""The packaged SmolLM2 with its real weights against `transformers`, which reads the same GGUF file by its
own code."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from search_r3_jax.config import EMBED_TOKEN, LoraConfig, SamplerConfig
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.models.decoder import positions_from_lengths
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, Prompter

pytestmark = pytest.mark.slow
TEXTS = ["how to sort a list by key", "def add(a, b):\n    return a + b", "  naïve café: 3.14 × 2 = 6.28?  "]


@pytest.fixture(scope="module")
def theirs() -> Any:
    file = resolve("smollm2")
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_logits_equal_transformers(smollm2: LoadedModel, theirs: Any) -> None:
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome. " * 12,
        "def quicksort(items):\n    if len(items) < 2:\n        return items\n" * 12,
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. " * 12,
        "In 1969, Neil Armstrong said: one small step for a man, one giant leap for mankind. " * 12,
    ]
    ids = np.array([smollm2.tokenizer(text)["input_ids"][:64] for text in texts], dtype=np.int32)
    assert ids.shape == (4, 64)
    hidden, _ = smollm2.decoder(jnp.asarray(ids), positions_from_lengths(jnp.full(4, 64), 64))
    ours = np.asarray(smollm2.decoder.logits(hidden))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours = ours[..., : expected.shape[-1]]
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))

    # What is left between the two is float32 rounding: the truth in float64 is as near. XLA's matrix products
    # on a CPU add up along one chain where torch's add up blocks, which alone makes 1.5 times the rounding of
    # a product.
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_array_equal(ours.argmax(-1), exact.argmax(-1))
    error, their_error = np.abs(ours - exact), np.abs(expected - exact)
    assert error.max() < 3e-4
    assert error.mean() < 2 * their_error.mean()


def test_greedy_reply_equals_generate(smollm2: LoadedModel, theirs: Any) -> None:
    prompter = Prompter(smollm2.tokenizer)
    graph, state = nnx.split(smollm2.decoder)
    sampler = Sampler(graph, prompter, SamplerConfig(max_think_tokens=16, temperature=0.0))
    queries = ["how do plants make sugar", "sort a list of tuples by their second element in python"]
    rollout = sampler.sample(state, queries, np.zeros((2, 1), np.uint32), max_tokens=32)
    for query, reply in zip(queries, rollout.replies(), strict=True):
        prompt = [*prompter.reason.prefix, *prompter.reason_rows([query], 32)[0]]
        with torch.no_grad():
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=2
            )
        expected = whole[0, len(prompt) :].tolist()
        assert reply[: len(expected)] == expected
        assert reply[len(expected) :] == list(prompter.reason.closing)


def test_export_loads_in_transformers_with_the_same_embedding(smollm2: LoadedModel, tmp_path: Path) -> None:
    adapted = with_lora(smollm2, LoraConfig(rank=4), seed=0)
    generator = np.random.default_rng(0)
    b = adapted.decoder.layers.q.lora_b
    assert b is not None
    b.set_value(jnp.asarray(0.02 * generator.standard_normal(b.shape), jnp.float32))
    folder = export_model(adapted, tmp_path / "export")
    graph, state = nnx.split(adapted.decoder)
    ours = Encoder(graph, Prompter(adapted.tokenizer)).encode(state, TEXTS, max_tokens=64)

    # The card's snippet, as a user would run it.
    code = (
        (folder / "README.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
        .replace('folder = "."', f"folder = {str(folder)!r}")
    )
    scope: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), scope)
    theirs = np.stack([scope["embed"](text).numpy() for text in TEXTS])
    cosines = np.sum(ours * theirs, axis=-1)
    assert cosines.min() >= 0.9999
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sentence_transformers_reads_the_same_tokens_and_computes_the_same_embeddings(
    smollm2: LoadedModel, tmp_path: Path
) -> None:
    folder = export_model(smollm2, tmp_path / "export", max_tokens=64)
    theirs = SentenceTransformer(str(folder))
    prompter = Prompter(smollm2.tokenizer)
    odd = [
        "",
        "'s",
        "12.5%",
        "(!)",
        "x\u2028y",
        "中文 é ́x",
        "a\n\n",
        "a<|im_end|>b",
        f"the {EMBED_TOKEN} token",
        "word " * 100,
    ]
    found = theirs.preprocess([*TEXTS, *odd], prompt=DIRECT_SYSTEM)
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
    ]
    assert rows == [[*prompter.direct.prefix, *row] for row in prompter.direct_rows([*TEXTS, *odd], 64)]
    graph, state = nnx.split(smollm2.decoder)
    ours = Encoder(graph, prompter).encode(state, [*TEXTS, odd[-1]], max_tokens=64)
    np.testing.assert_allclose(theirs.encode([*TEXTS, odd[-1]], prompt_name="query"), ours, atol=1e-5)


def test_export_reloads_bit_for_bit(smollm2: LoadedModel, tmp_path: Path) -> None:
    folder = export_model(smollm2, tmp_path / "export")
    again = load_model(folder)
    assert again.embed_id == smollm2.embed_id
    assert (
        json.loads((folder / "config.json").read_text())["vocab_size"]
        == again.decoder.config.vocab_size
        == 49280
    )
    assert again.tokenizer.convert_tokens_to_ids(EMBED_TOKEN) == smollm2.embed_id
    for ours, theirs in zip(
        nnx.to_pure_dict(nnx.state(smollm2.decoder)).items(),
        nnx.to_pure_dict(nnx.state(again.decoder)).items(),
        strict=True,
    ):
        jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    direct = again.tokenizer.apply_chat_template(
        [{"role": "system", "content": DIRECT_SYSTEM}, {"role": "user", "content": TEXTS[0]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    prompter = Prompter(again.tokenizer)
    whole = again.tokenizer(str(direct) + CLOSING, add_special_tokens=False)["input_ids"]
    assert whole == [*prompter.direct.prefix, *prompter.direct_rows([TEXTS[0]], 64)[0]]
