"""The decoder against torch `transformers` in float32: every family, with blocks in place of a cache, padded
and packed."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers.tiny_models import CONFIG, VARIANTS, write_tiny_checkpoint
from transformers import AutoModelForCausalLM

from search_r3_jax.hub.load_model import LoadedModel, load_model
from search_r3_jax.models.decoder import REMAT_POLICIES, Decoder, positions_from_lengths
from search_r3_jax.models.kv_block import EMPTY_POSITION, KVBlock
from search_r3_jax.rollout.prefill import prefill

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), request.param)
    return load_model(folder), AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 259, (rows, length)).astype(np.int32)


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()


def test_logits_equal_torch(pair: tuple[LoadedModel, Any]) -> None:
    ours, theirs = pair
    ids = random_ids(3, 37)
    hidden, _ = ours.decoder(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(37, dtype=jnp.int32), ids.shape))
    expected = torch_logits(theirs, ids)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(
        np.asarray(ours.decoder.logits(hidden))[..., : expected.shape[-1]], expected, atol=TOLERANCE
    )


def test_padding_changes_nothing_on_either_side(pair: tuple[LoadedModel, Any]) -> None:
    ours, theirs = pair
    ids = random_ids(2, 20)
    lengths = np.array([20, 11])
    expected = [torch_logits(theirs, ids[i : i + 1, :length])[0] for i, length in enumerate(lengths)]
    right = ours.decoder.logits(
        ours.decoder(jnp.asarray(ids), positions_from_lengths(jnp.asarray(lengths), 20))[0]
    )
    shifted = np.stack([np.roll(row, 20 - length) for row, length in zip(ids, lengths, strict=True)])
    at = np.stack([np.concatenate([np.full(20 - n, EMPTY_POSITION), np.arange(n)]) for n in lengths]).astype(
        np.int32
    )
    left = ours.decoder.logits(ours.decoder(jnp.asarray(shifted), jnp.asarray(at))[0])
    V = expected[0].shape[-1]
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(right)[i, :length, :V], expected[i], atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(left)[i, 20 - length :, :V], expected[i], atol=TOLERANCE)


def test_packed_rows_do_not_see_each_other(pair: tuple[LoadedModel, Any]) -> None:
    ours, theirs = pair
    first, second = random_ids(1, 9, 1), random_ids(1, 14, 2)
    ids = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(14)])[None].astype(np.int32)
    segments = np.concatenate([np.zeros(9), np.ones(14)])[None].astype(np.int32)
    hidden, _ = ours.decoder(jnp.asarray(ids), jnp.asarray(positions), segments_bt=jnp.asarray(segments))
    logits = np.asarray(ours.decoder.logits(hidden))[0]
    expected = np.concatenate([torch_logits(theirs, first)[0], torch_logits(theirs, second)[0]])
    np.testing.assert_allclose(logits[:, : expected.shape[-1]], expected, atol=TOLERANCE)


@pytest.mark.slow
def test_shared_prefix_prompt_and_cache_equal_one_long_sequence(pair: tuple[LoadedModel, Any]) -> None:
    """A prefix of one row, a prompt per query, replies per sample, one token at a time: as torch on whole
    rows."""
    ours, theirs = pair
    decoder = ours.decoder
    Q, G = 2, 3
    prefix, prompts, replies = random_ids(1, 7, 3), random_ids(Q, 6, 4), random_ids(Q * G, 5, 5)
    _, shared = decoder(jnp.asarray(prefix), jnp.arange(7, dtype=jnp.int32)[None])
    at = jnp.broadcast_to(7 + jnp.arange(6, dtype=jnp.int32), (Q, 6))
    _, own = decoder(jnp.asarray(prompts), at, contexts=[shared])
    whole = np.concatenate([np.repeat(prefix, Q * G, 0), np.repeat(prompts, G, 0), replies], axis=1)
    expected = torch_logits(theirs, whole)[:, 13:]
    cache: list[KVBlock] = []
    for t in range(5):
        position = jnp.full((Q * G, 1), 13 + t, jnp.int32)
        hidden, block = decoder(jnp.asarray(replies[:, t : t + 1]), position, contexts=[shared, own, *cache])
        cache.append(block)
        np.testing.assert_allclose(
            np.asarray(decoder.logits(hidden))[:, 0, : expected.shape[-1]], expected[:, t], atol=TOLERANCE
        )


def test_a_later_key_is_never_seen(tiny_model: LoadedModel) -> None:
    ids = random_ids(1, 12)
    changed = ids.copy()
    changed[0, 8:] = random_ids(1, 4, 9)
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    before, _ = tiny_model.decoder(jnp.asarray(ids), positions)
    after, _ = tiny_model.decoder(jnp.asarray(changed), positions)
    np.testing.assert_array_equal(np.asarray(before)[0, :8], np.asarray(after)[0, :8])
    assert np.abs(np.asarray(before)[0, 8:] - np.asarray(after)[0, 8:]).max() > 1e-3


def continued_by_torch(model: Any, prompt: np.ndarray, tokens: int, *, use_cache: bool) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=use_cache,
        )
    return out[0, len(prompt) :].tolist()


def continued_with_cache(decoder: Decoder, ids: np.ndarray, positions: np.ndarray, tokens: int) -> np.ndarray:
    """Greedy tokens [B,tokens] behind prompts padded on either side; the cache is a block that grows in
    place."""
    B, _T = ids.shape
    V = 320
    hidden, prompt = decoder(jnp.asarray(ids), jnp.asarray(positions))
    last = positions.argmax(axis=1)
    logits = decoder.logits(hidden[jnp.arange(B), last])[:, :V]
    shape = (decoder.config.layers, B, tokens, decoder.config.kv_heads, decoder.config.head_dim)
    cache = KVBlock(jnp.zeros(shape), jnp.zeros(shape), jnp.full((B, tokens), EMPTY_POSITION, jnp.int32))
    graph, state = nnx.split(decoder)
    found = np.zeros((B, tokens), np.int32)
    for t in range(tokens):
        found[:, t] = np.argmax(np.asarray(logits), axis=-1)
        position = jnp.asarray(positions.max(axis=1) + 1 + t, jnp.int32)[:, None]
        hidden, own = _step(graph, state, jnp.asarray(found[:, t : t + 1]), position, [prompt, cache])
        cache = KVBlock(
            cache.keys.at[:, :, t].set(own.keys[:, :, 0]),
            cache.values.at[:, :, t].set(own.values[:, :, 0]),
            cache.positions.at[:, t].set(position[:, 0]),
        )
        logits = decoder.logits(hidden[:, 0])[:, :V]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _step(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    token: jax.Array,
    position: jax.Array,
    contexts: list[KVBlock],
) -> tuple[jax.Array, KVBlock]:
    return nnx.merge(graph, state)(token, position, contexts=contexts)


def continued_without_cache(decoder: Decoder, prompt: np.ndarray, tokens: int) -> list[int]:
    graph, state = nnx.split(decoder)
    row = np.zeros((1, 24), np.int32)
    row[0, : len(prompt)] = prompt
    for t in range(len(prompt), len(prompt) + tokens):
        row[0, t] = int(np.argmax(np.asarray(_whole(graph, state, row, np.array([t])))[0, t - 1, :320]))
    return row[0, len(prompt) : len(prompt) + tokens].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _whole(graph: nnx.GraphDef[Decoder], state: nnx.State, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    decoder = nnx.merge(graph, state)
    return decoder.logits(decoder(ids, positions_from_lengths(lengths, ids.shape[1]))[0])


def test_greedy_continuation_equals_generate(pair: tuple[LoadedModel, Any]) -> None:
    ours, theirs = pair
    tokens, lengths = 10, (13, 7)
    prompts = [random_ids(1, length, 10 + length)[0] for length in lengths]
    expected = [continued_by_torch(theirs, prompt, tokens, use_cache=True) for prompt in prompts]
    assert expected == [continued_by_torch(theirs, prompt, tokens, use_cache=False) for prompt in prompts]
    T = max(lengths)
    for left in (False, True):
        ids, positions = np.zeros((2, T), np.int32), np.full((2, T), EMPTY_POSITION, np.int32)
        for i, prompt in enumerate(prompts):
            at = slice(T - len(prompt), T) if left else slice(0, len(prompt))
            ids[i, at], positions[i, at] = prompt, np.arange(len(prompt))
        assert continued_with_cache(ours.decoder, ids, positions, tokens).tolist() == expected
    assert [continued_without_cache(ours.decoder, prompt, tokens) for prompt in prompts] == expected


def test_a_window_hides_what_lies_before_it() -> None:
    """By hand: with one windowed layer, a change further back than the window does not reach a position."""
    config = dataclasses.replace(CONFIG, layers=1, sliding_window=4, windowed=(True,))
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    ids = jnp.asarray(random_ids(1, 12))
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    before = np.asarray(decoder(ids, positions)[0])[0]
    after = np.asarray(decoder(ids.at[0, 3].add(1), positions)[0])[0]
    moved = np.abs(after - before).max(axis=-1) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.slow
def test_chunked_prefill_equals_one_pass(chunk: int) -> None:
    config = dataclasses.replace(CONFIG, sliding_window=5, windowed=(False, True))
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    _, shared = decoder(jnp.asarray(random_ids(1, 6)), jnp.arange(6, dtype=jnp.int32)[None])
    ids = jnp.asarray(random_ids(3, 18, 1))
    positions = positions_from_lengths(jnp.array([18, 11, 2]), 18, 6)
    whole_hidden, whole = decoder(ids, positions, contexts=[shared])
    hidden, block = prefill(decoder, ids, positions, chunk=chunk, contexts=[shared])
    there = np.asarray(positions) != EMPTY_POSITION
    np.testing.assert_allclose(np.asarray(hidden)[there], np.asarray(whole_hidden)[there], atol=2e-5)
    np.testing.assert_allclose(np.asarray(block.keys)[:, there], np.asarray(whole.keys)[:, there], atol=2e-5)
    np.testing.assert_array_equal(np.asarray(block.positions), np.asarray(positions))


def loss_and_gradient(decoder: Decoder) -> tuple[float, Any]:
    graph, params = nnx.split(decoder)
    ids, weights = (
        jnp.asarray(random_ids(2, 16)),
        np.random.default_rng(3).standard_normal((2, 16, CONFIG.hidden_size)),
    )
    positions = positions_from_lengths(jnp.array([16, 9]), 16)

    def loss(params: nnx.State) -> jax.Array:
        hidden, _ = nnx.merge(graph, params)(ids, positions)
        return jnp.sum(
            hidden.astype(jnp.float32) * jnp.where(positions[..., None] == EMPTY_POSITION, 0.0, weights)
        )

    # With the emitters that users have: the older ones that the tests use, where the line of JAX has them,
    # round differently where a value is computed again.
    older = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
    options = {"xla_cpu_use_fusion_emitters": True} if older else {}
    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=options)
    value, gradient = compiled(params)
    return float(value), nnx.to_pure_dict(gradient)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.slow
def test_remat_changes_no_gradient(remat: str) -> None:
    plain = loss_and_gradient(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    value, gradient = loss_and_gradient(Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat))
    assert value == pytest.approx(plain[0], rel=1e-6)
    jax.tree.map(
        lambda mine, expected: np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5),
        gradient,
        plain[1],
    )


def test_offload_sends_layer_inputs_to_the_host() -> None:
    graph, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), remat="offload"))
    ids, positions = jnp.ones((2, 16), jnp.int32), jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))

    def loss(params: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(ids, positions)[0])

    traced = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert traced.count("MemorySpace.Host") >= 1
    assert f"f32<host>[2,16,{CONFIG.hidden_size}]" in traced


@pytest.mark.slow
def test_bfloat16_computes_over_float32_parameters() -> None:
    precise, coarse = (
        Decoder(CONFIG, rngs=nnx.Rngs(0), compute_dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    ids, positions = (
        jnp.asarray(random_ids(2, 16)),
        jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16)),
    )
    hidden, block = coarse(ids, positions)
    assert (hidden.dtype, block.keys.dtype, coarse.logits(hidden).dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    expected = np.asarray(precise(ids, positions)[0])
    error = np.abs(np.asarray(hidden, np.float32) - expected).mean() / np.abs(expected).mean()
    # Eight bits of mantissa over two layers: some per cent; less would mean that nothing was rounded.
    assert 1e-3 < error < 3e-2
    _, gradient = loss_and_gradient(coarse)
    _, expected_gradient = loss_and_gradient(precise)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    flat, expected_flat = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, expected_gradient)
    )
    assert flat @ expected_flat / np.linalg.norm(flat) / np.linalg.norm(expected_flat) > 0.999


def test_an_embedding_never_touches_the_vocabulary() -> None:
    """No array of a forward pass to hidden states, however it is fused, has the vocabulary as a dimension,
    but the table itself."""
    decoder = Decoder(dataclasses.replace(CONFIG, vocab_size=331, tied_embeddings=False), rngs=nnx.Rngs(0))
    graph, params = nnx.split(decoder)
    traced = jax.make_jaxpr(lambda p, ids, at: nnx.merge(graph, p)(ids, at)[0])(
        params, random_ids(2, 8), np.zeros((2, 8), np.int32)
    )
    made = [variable.aval.shape for equation in traced.jaxpr.eqns for variable in equation.outvars]
    assert made
    assert all(331 not in shape for shape in made)
