"""The decoder against torch `transformers` in float32: every family, with blocks in place of a cache, padded and packed."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from search_r3_jax.hub.checkpoint import LoadedModel, load_model
from search_r3_jax.models.attention import NOTHING, KVBlock
from search_r3_jax.models.decoder import positions_from_lengths

FAMILIES = ("llama", "qwen2", "qwen3")
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> tuple[LoadedModel, torch.nn.Module]:
    folder = tiny_folders[request.param]
    return load_model(folder), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 259, (rows, length)).astype(np.int32)


def torch_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()


def test_logits_equal_torch(pair: tuple[LoadedModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    ids = random_ids(3, 37)
    hidden, _ = ours.decoder(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(37, dtype=jnp.int32), ids.shape))
    expected = torch_logits(theirs, ids)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(np.asarray(ours.decoder.logits(hidden))[..., : expected.shape[-1]], expected, atol=TOLERANCE)


def test_padding_changes_nothing_on_either_side(pair: tuple[LoadedModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    ids = random_ids(2, 20)
    lengths = np.array([20, 11])
    expected = [torch_logits(theirs, ids[i : i + 1, :length])[0] for i, length in enumerate(lengths)]
    right = ours.decoder.logits(ours.decoder(jnp.asarray(ids), positions_from_lengths(jnp.asarray(lengths), 20))[0])
    shifted = np.stack([np.roll(row, 20 - length) for row, length in zip(ids, lengths, strict=True)])
    at = np.stack([np.concatenate([np.full(20 - n, NOTHING), np.arange(n)]) for n in lengths]).astype(np.int32)
    left = ours.decoder.logits(ours.decoder(jnp.asarray(shifted), jnp.asarray(at))[0])
    V = expected[0].shape[-1]
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(right)[i, :length, :V], expected[i], atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(left)[i, 20 - length :, :V], expected[i], atol=TOLERANCE)


def test_packed_rows_do_not_see_each_other(pair: tuple[LoadedModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    first, second = random_ids(1, 9, 1), random_ids(1, 14, 2)
    ids = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(14)])[None].astype(np.int32)
    segments = np.concatenate([np.zeros(9), np.ones(14)])[None].astype(np.int32)
    hidden, _ = ours.decoder(jnp.asarray(ids), jnp.asarray(positions), segments_bt=jnp.asarray(segments))
    logits = np.asarray(ours.decoder.logits(hidden))[0]
    expected = np.concatenate([torch_logits(theirs, first)[0], torch_logits(theirs, second)[0]])
    np.testing.assert_allclose(logits[:, : expected.shape[-1]], expected, atol=TOLERANCE)


def test_shared_prefix_prompt_and_cache_equal_one_long_sequence(pair: tuple[LoadedModel, torch.nn.Module]) -> None:
    """A prefix of one row, a prompt per query, replies per sample, one token at a time: as torch on whole rows."""
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
        np.testing.assert_allclose(np.asarray(decoder.logits(hidden))[:, 0, : expected.shape[-1]], expected[:, t], atol=TOLERANCE)


def test_a_later_key_is_never_seen(tiny_model: LoadedModel) -> None:
    ids = random_ids(1, 12)
    changed = ids.copy()
    changed[0, 8:] = random_ids(1, 4, 9)
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    before, _ = tiny_model.decoder(jnp.asarray(ids), positions)
    after, _ = tiny_model.decoder(jnp.asarray(changed), positions)
    np.testing.assert_array_equal(np.asarray(before)[0, :8], np.asarray(after)[0, :8])
    assert np.abs(np.asarray(before)[0, 8:] - np.asarray(after)[0, 8:]).max() > 1e-3
