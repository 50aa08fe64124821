"""Adapters: a fresh one changes nothing, a merged one computes the same, the base is shared and stays frozen."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from search_r3_jax.config import LoraConfig
from search_r3_jax.hub.checkpoint import LoadedModel
from search_r3_jax.models.decoder import Decoder, LoraParam
from search_r3_jax.models.lora import add_lora, merge_lora, trainable_filter

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))


def hidden_and_logits(decoder: Decoder, adapters: bool = True) -> tuple[np.ndarray, np.ndarray]:
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 260, (2, 16)), jnp.int32).at[:, -1].set(decoder.embed_id)
    hidden, _ = decoder(ids, jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), ids.shape), adapters=adapters)
    return np.asarray(hidden), np.asarray(decoder.logits(hidden, adapters))


def disturbed(model: LoadedModel) -> Decoder:
    """A decoder with adapters that really do something."""
    decoder = add_lora(model.decoder, LORA, seed=1)
    params = nnx.state(decoder, LoraParam)
    generator = np.random.default_rng(2)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.1 * generator.standard_normal(x.shape).astype(np.float32), params))
    return decoder


def test_fresh_adapters_change_nothing(tiny_model: LoadedModel) -> None:
    for ours, base in zip(
        hidden_and_logits(add_lora(tiny_model.decoder, LORA, seed=1)), hidden_and_logits(tiny_model.decoder), strict=True
    ):
        np.testing.assert_allclose(ours, base, atol=1e-6)


def test_merged_equals_adapted_and_differs_from_the_base(tiny_model: LoadedModel) -> None:
    adapted = disturbed(tiny_model)
    for merged, live, base in zip(
        hidden_and_logits(merge_lora(adapted)), hidden_and_logits(adapted), hidden_and_logits(tiny_model.decoder), strict=True
    ):
        np.testing.assert_allclose(merged, live, atol=2e-5)
        assert np.abs(merged - base).max() > 1e-2


def test_without_adapters_it_is_the_base(tiny_model: LoadedModel) -> None:
    for ours, base in zip(hidden_and_logits(disturbed(tiny_model), adapters=False), hidden_and_logits(tiny_model.decoder), strict=True):
        np.testing.assert_array_equal(ours, base)


def test_only_adapters_and_the_embed_row_learn(tiny_model: LoadedModel) -> None:
    decoder = add_lora(tiny_model.decoder, LORA, seed=1)
    _, params, _ = nnx.split(decoder, trainable_filter(decoder), ...)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))}
    assert names == {"['embed_row']"} | {f"['layers']['{t}']['lora_{f}']" for t in LORA.targets for f in "ab"}


def test_the_base_is_shared_not_copied(tiny_model: LoadedModel) -> None:
    adapted = add_lora(tiny_model.decoder, LORA, seed=1)
    assert adapted.embedding[...] is tiny_model.decoder.embedding[...]
    assert adapted.layers.gate.kernel[...] is tiny_model.decoder.layers.gate.kernel[...]
