"""Adapters: a fresh one changes nothing, a merged one computes the same, the base is shared and stays
frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from search_r3_jax.config import LoraConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.layers import LINEARS, Linear, LoraParam
from search_r3_jax.models.lora import add_lora, merge_lora, trainable_filter

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))


def hidden_and_logits(decoder: Decoder, adapters: bool = True) -> tuple[np.ndarray, np.ndarray]:
    ids = (
        jnp.asarray(np.random.default_rng(0).integers(3, 260, (2, 16)), jnp.int32)
        .at[:, -1]
        .set(decoder.embed_id)
    )
    hidden, _ = decoder(ids, jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), ids.shape), adapters=adapters)
    return np.asarray(hidden), np.asarray(decoder.logits(hidden, adapters))


def disturbed(model: LoadedModel) -> Decoder:
    """A decoder with adapters that really do something."""
    decoder = add_lora(model.decoder, LORA, seed=1)
    params = nnx.state(decoder, LoraParam)
    generator = np.random.default_rng(2)
    nnx.update(
        decoder,
        jax.tree.map(lambda x: x + 0.1 * generator.standard_normal(x.shape).astype(np.float32), params),
    )
    return decoder


def test_fresh_adapters_change_nothing(tiny_model: LoadedModel) -> None:
    for ours, base in zip(
        hidden_and_logits(add_lora(tiny_model.decoder, LORA, seed=1)),
        hidden_and_logits(tiny_model.decoder),
        strict=True,
    ):
        np.testing.assert_allclose(ours, base, atol=1e-6)


def test_merged_equals_adapted_and_differs_from_the_base(tiny_model: LoadedModel) -> None:
    adapted = disturbed(tiny_model)
    for merged, live, base in zip(
        hidden_and_logits(merge_lora(adapted)),
        hidden_and_logits(adapted),
        hidden_and_logits(tiny_model.decoder),
        strict=True,
    ):
        np.testing.assert_allclose(merged, live, atol=2e-5)
        assert np.abs(merged - base).max() > 1e-2


def test_without_adapters_it_is_the_base(tiny_model: LoadedModel) -> None:
    for ours, base in zip(
        hidden_and_logits(disturbed(tiny_model), adapters=False),
        hidden_and_logits(tiny_model.decoder),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, base)


def test_only_adapters_and_the_embed_row_learn(tiny_model: LoadedModel) -> None:
    decoder = add_lora(tiny_model.decoder, LORA, seed=1)
    _, params, _ = nnx.split(decoder, trainable_filter(decoder), ...)
    names = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
    }
    assert names == {"['embed_row']"} | {f"['layers']['{t}']['lora_{f}']" for t in LORA.targets for f in "ab"}


def test_the_base_is_shared_not_copied(tiny_model: LoadedModel) -> None:
    adapted = add_lora(tiny_model.decoder, LORA, seed=1)
    assert adapted.embedding[...] is tiny_model.decoder.embedding[...]
    assert adapted.layers.gate.kernel[...] is tiny_model.decoder.layers.gate.kernel[...]


@pytest.mark.parametrize("target", LINEARS)
def test_every_linear_layer_can_carry_an_adapter(tiny_model: LoadedModel, target: str) -> None:
    """One adapter alone moves the output by what float64 kernels with the update inside would."""
    decoder = add_lora(tiny_model.decoder, LoraConfig(rank=2, alpha=4.0, targets=(target,)), seed=1)
    linear = getattr(decoder.layers, target)
    linear.lora_b.set_value(
        jnp.asarray(np.random.default_rng(3).standard_normal(linear.lora_b.shape), jnp.float32) * 0.1
    )
    update = np.asarray(linear.lora_a[...], np.float64) @ np.asarray(linear.lora_b[...], np.float64) * 2.0
    merged = getattr(merge_lora(decoder).layers, target).kernel[...]
    np.testing.assert_allclose(merged, np.asarray(linear.kernel[...], np.float64) + update, atol=1e-6)
    np.testing.assert_allclose(
        hidden_and_logits(merge_lora(decoder))[0], hidden_and_logits(decoder)[0], atol=2e-5
    )


def test_an_unknown_layer_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: 'query' is no linear layer"):
        add_lora(tiny_model.decoder, LoraConfig(targets=("q", "query")), seed=0)


def test_dropout_zeroes_inputs_of_adapters_only() -> None:
    """y = x·W + (mask ∘ x / (1 − p))·A·B·alpha/rank, with the share p of the mask zero, and the base
    untouched."""
    layer = Linear("q", 64, 32, bias=True, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.25), rngs=nnx.Rngs(0))
    assert layer.lora_b is not None
    assert layer.lora_a is not None
    layer.lora_b.set_value(jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4096, 64)), jnp.float32)
    key = jax.random.key(0)
    base, whole, dropped = layer([x, x, x], [False, True, True], [key, None, key])
    whole, dropped = whole - base, dropped - base
    factor = np.asarray(layer.lora_a[...], np.float64) @ np.asarray(layer.lora_b[...], np.float64) * 2.0
    np.testing.assert_allclose(whole, np.asarray(x, np.float64) @ factor, atol=1e-4)
    # Unbiased over the masks, and as spread as p/(1−p) · Σ x² · factor² says.
    difference = np.asarray(dropped - whole, np.float64)
    expected_spread = np.sqrt((0.25 / 0.75 * np.asarray(x, np.float64) ** 2 @ factor**2).mean())
    assert abs(difference.mean()) < 4 * expected_spread / np.sqrt(difference.size / 32)
    assert difference.std() == pytest.approx(expected_spread, rel=0.03)
    first, second = layer([x, x], [True, True], [key, key])
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_layers_drop_different_inputs(tiny_model: LoadedModel) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
    decoder = add_lora(tiny_model.decoder, lora, seed=1)
    params = nnx.state(decoder, LoraParam)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.05, params))
    ids, positions = jnp.full((1, 6), 7, jnp.int32), jnp.arange(6, dtype=jnp.int32)[None]
    plain, _ = decoder(ids, positions)
    first, second = (decoder(ids, positions, dropout_key=jax.random.key(seed))[0] for seed in (0, 1))
    assert np.abs(np.asarray(first - second)).max() > 1e-3
    assert np.abs(np.asarray(first - plain)).max() > 1e-3
    off, _ = decoder(ids, positions, dropout_key=jax.random.key(0), adapters=False)
    np.testing.assert_array_equal(off, decoder(ids, positions, adapters=False)[0])
