"""KL to the base model, sliced over tokens and vocabulary, against float64 over the full matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from search_r3_jax.objectives.language import Head, kl_to_base, token_kl, token_log_probs

M, D, V, ROW = 13, 8, 50, 37
SCALE = np.float32(D**-0.5)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def two_models(distance: float) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """States [M,D] and heads [V,D] of the base and of a model so far from it; logits are about 1."""
    base = normal(M, D, seed=0), SCALE * normal(V, D, seed=1)
    return base, (
        base[0] + distance * normal(M, D, seed=2),
        base[1] + distance * SCALE * normal(V, D, seed=3),
    )


def kl_by_hand(
    hidden: torch.Tensor, weight_vd: torch.Tensor, base_hidden: np.ndarray, base_vd: np.ndarray
) -> torch.Tensor:
    log_p = torch.log_softmax(hidden @ weight_vd.T, -1)
    log_q = torch.log_softmax(
        torch.tensor(base_hidden, dtype=torch.float64) @ torch.tensor(base_vd, dtype=torch.float64).T, -1
    )
    return torch.sum(torch.exp(log_p) * (log_p - log_q), -1)


@pytest.mark.parametrize("distance", [1.0, 0.3])
@pytest.mark.parametrize(("chunk", "vocab_chunk"), [(256, 16384), (4, 16), (5, 50), (13, 7)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("own_row", [True, False])
def test_equals_float64_over_the_full_matrices(
    distance: float, chunk: int, vocab_chunk: int, tied: bool, own_row: bool
) -> None:
    (base_hidden, base_vd), (hidden, weight_vd) = two_models(distance)
    row, mask = weight_vd[0] + distance * SCALE * normal(D, seed=4), np.random.default_rng(5).random(M) < 0.7

    def mean(hidden: jax.Array, weight: jax.Array, row: jax.Array) -> jax.Array:
        layout: dict[str, Any] = (
            {"weight": weight, "vocab_axis": 0} if tied else {"weight": weight.T, "vocab_axis": 1}
        )
        head = Head(**layout, row_d=row, row_id=ROW) if own_row else Head(**layout)
        base = Head(weight=jnp.asarray(base_vd))
        total, count = kl_to_base(
            hidden,
            head,
            jnp.asarray(base_hidden),
            base,
            jnp.asarray(mask),
            chunk=chunk,
            vocab_chunk=vocab_chunk,
        )
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))(hidden, weight_vd, row)
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, weight_vd, row)]
    used = leaves[1]
    if own_row:
        used = torch.where(torch.arange(V)[:, None] == ROW, leaves[2], used)
    expected = kl_by_hand(leaves[0], used, base_hidden, base_vd)[torch.tensor(mask)].mean()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        wanted = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        assert np.linalg.norm(gradient - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("distance", [0.1, 0.01])
def test_a_small_divergence_is_not_drowned_by_rounding(distance: float) -> None:
    (base_hidden, base_vd), (hidden, weight_vd) = two_models(distance)
    ours = token_kl(
        jnp.asarray(hidden),
        Head(weight=jnp.asarray(weight_vd)),
        jnp.asarray(base_hidden),
        Head(weight=jnp.asarray(base_vd)),
    )
    expected = kl_by_hand(
        torch.tensor(hidden, dtype=torch.float64),
        torch.tensor(weight_vd, dtype=torch.float64),
        base_hidden,
        base_vd,
    )
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6 / distance)


def test_the_same_model_has_no_divergence_and_no_gradient() -> None:
    hidden, weight = jnp.asarray(normal(M, D, seed=0)), jnp.asarray(normal(V, D, seed=1))
    base = Head(weight=weight)

    def total(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(
            token_kl(
                hidden, Head(weight=weight), jax.lax.stop_gradient(hidden), base, chunk=4, vocab_chunk=16
            )
        )

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, weight)
    assert float(value) == 0
    assert all(np.abs(gradient).max() <= 1e-7 for gradient in gradients)


def test_no_gradient_reaches_the_base() -> None:
    hidden, weight = jnp.asarray(normal(M, D, seed=0)), jnp.asarray(normal(V, D, seed=1))

    def total(base_hidden: jax.Array, base_weight: jax.Array) -> jax.Array:
        return jnp.sum(token_kl(hidden, Head(weight=weight), base_hidden, Head(weight=base_weight)))

    for gradient in jax.grad(total, argnums=(0, 1))(hidden + 1, weight + 1):
        np.testing.assert_array_equal(gradient, 0)


def test_masked_columns_and_what_padding_holds_stay_finite() -> None:
    hidden, weight = normal(M, D, seed=0), normal(V, D, seed=1)
    hidden[:, 0], weight[3, 0], weight[4, 0] = 1, -np.inf, -1e30
    hidden[1] = np.nan
    mask = jnp.arange(M) != 1
    base = Head(weight=jnp.asarray(weight + 0.1 * normal(V, D, seed=2)))

    def total(hidden: jax.Array) -> jax.Array:
        head = Head(weight=jnp.asarray(weight))
        return kl_to_base(hidden, head, hidden, base, mask, chunk=4, vocab_chunk=16)[0]

    assert np.isfinite(total(jnp.asarray(hidden)))
    finite = jnp.asarray(np.where(np.isfinite(weight), weight, -1e30))
    gradient = jax.grad(
        lambda h: kl_to_base(h, Head(weight=finite), h, base, mask, chunk=4, vocab_chunk=16)[0]
    )(jnp.asarray(hidden))
    assert np.isfinite(gradient).all()


def test_vocabularies_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="50 and 49"):
        token_kl(
            jnp.ones((2, D)),
            Head(weight=jnp.ones((V, D))),
            jnp.ones((2, D)),
            Head(weight=jnp.ones((V - 1, D))),
        )


@pytest.mark.parametrize("learned", ["hidden", "weight"])
def test_no_more_than_one_slice_of_logits_exists(learned: str) -> None:
    M, D, V, chunk, vocab_chunk = 512, 16, 32768, 64, 2048
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, D), (V, D), (M, D), (V, D))]

    def total(
        hidden: jax.Array, weight: jax.Array, base_hidden: jax.Array, base_weight: jax.Array
    ) -> jax.Array:
        heads = Head(weight=weight), Head(weight=base_weight)
        return jnp.sum(
            token_kl(hidden, heads[0], base_hidden, heads[1], chunk=chunk, vocab_chunk=vocab_chunk)
        )

    compiled = jax.jit(jax.grad(total, argnums=0 if learned == "hidden" else 1)).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # A few arrays of one slice, and the states; all logits at once would be M·V·4 bytes, one chunk over the
    # whole vocabulary chunk·V·4.
    slices = memory.temp_size_in_bytes / (chunk * vocab_chunk * 4)
    assert slices < 8
    assert memory.temp_size_in_bytes < 0.6 * chunk * V * 4


def test_equals_the_decoders_logits(tiny_folders: dict[str, Any]) -> None:
    from search_r3_jax.config import LoraConfig
    from search_r3_jax.hub.load_model import load_model, with_lora

    for family in ("llama", "qwen2"):
        decoder = with_lora(load_model(tiny_folders[family]), LoraConfig(rank=2), seed=0).decoder
        V, D = decoder.config.vocab_size, decoder.config.hidden_size
        hidden = jnp.asarray(normal(M, D, seed=0))
        row = decoder.embed_row if decoder.head is None else decoder.head_row
        assert row is not None
        assert decoder.embed_id is not None
        row[...] = jnp.asarray(normal(D, seed=1))
        matrix = decoder.embedding[...] if decoder.head is None else decoder.head[...]
        axis = 0 if decoder.head is None else 1
        head = Head(weight=matrix, vocab_axis=axis, row_d=row[...], row_id=decoder.embed_id)
        base = Head(weight=matrix, vocab_axis=axis)
        log_p, log_q = (jax.nn.log_softmax(decoder.logits(hidden, adapters)) for adapters in (True, False))
        expected = np.sum(np.exp(log_p) * (np.asarray(log_p, np.float64) - log_q), axis=-1)
        np.testing.assert_allclose(
            token_kl(hidden, head, hidden, base, chunk=4, vocab_chunk=V // 3), expected, rtol=1e-4, atol=1e-6
        )
        assert expected.max() > 1e-3


def test_log_probs_with_masked_columns_are_finite() -> None:
    hidden, weight = normal(M, D, seed=0), normal(D, V, seed=1)
    closed = jnp.arange(V) % 3 == 0

    def total(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs, entropies = token_log_probs(
            lambda h: jnp.where(closed, -jnp.inf, h @ jnp.asarray(weight)),
            hidden,
            jnp.full(M, 1, jnp.int32),
            chunk=4,
        )
        return jnp.sum(log_probs), entropies

    (value, entropies), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(hidden))
    open_logits = torch.tensor(hidden @ weight[:, ~np.asarray(closed)])
    np.testing.assert_allclose(
        entropies, torch.distributions.Categorical(logits=open_logits).entropy().numpy(), rtol=1e-5
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
