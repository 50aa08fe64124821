"""What must not change the policy loss: the order of rows, how they are cut into micro-batches, and what
masks hide."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3_jax.objectives.policy_gradient import PolicyStatistics, group_advantages, policy_loss

B, T = 6, 5
VARIANTS = ["grpo", "dr_grpo", "dapo", "gspo"]
FULL = ("current", "old", "reference", "sampler", "entropies")


@partial(jax.jit, static_argnames="variant")
def loss_and_gradient(
    arrays: dict[str, jax.Array], variant: Any
) -> tuple[tuple[jax.Array, jax.Array, PolicyStatistics], jax.Array]:
    """(sum, count, statistics) with every term on, and the gradient of the sum by the current
    log-probabilities."""

    def loss(log_probs: jax.Array):
        total, count, statistics = policy_loss(
            log_probs,
            arrays["advantages"],
            arrays["mask"],
            variant=variant,
            clip_high=0.3,
            max_tokens=11,
            old_log_probs_bt=arrays["old"],
            reference_log_probs_bt=arrays["reference"],
            beta=0.2,
            sampler_log_probs_bt=arrays["sampler"],
            importance_cap=1.2,
            entropies_bt=arrays["entropies"],
        )
        return total, (total, count, statistics)

    gradient, results = jax.grad(loss, has_aux=True)(arrays["current"])
    return results, gradient


def inputs(seed: int, rows: int = B, tokens: int = T) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        name: generator.normal(-2, 0.4, (rows, tokens)).astype(np.float32) for name in FULL
    }
    arrays["advantages"] = generator.standard_normal(rows).astype(np.float32)
    # Some rows have no sampled token at all.
    arrays["mask"] = (generator.random((rows, tokens)) < 0.6) & (generator.random((rows, 1)) < 0.8)
    return arrays


def assert_same(mine: tuple[Any, Any, PolicyStatistics], other: tuple[Any, Any, PolicyStatistics]) -> None:
    np.testing.assert_allclose(mine[0], other[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mine[1], other[1])
    scalars, others = mine[2].scalars(), other[2].scalars()
    for name, scalar in scalars.items():
        np.testing.assert_allclose(scalar, others[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.isfinite(scalar), name


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_and_micro_batches_change_nothing(variant: str, seed: int) -> None:
    arrays = inputs(seed)
    whole, gradient = loss_and_gradient(arrays, variant)
    order = np.random.default_rng(seed).permutation(B)
    parts = [
        loss_and_gradient({name: array[rows] for name, array in arrays.items()}, variant)
        for rows in np.split(order, 3)
    ]
    total, count, statistics = parts[0][0]
    for results, _ in parts[1:]:
        total, count, statistics = total + results[0], count + results[1], statistics.merged(results[2])
    assert_same(whole, (total, count, statistics))
    np.testing.assert_allclose(
        np.concatenate([part for _, part in parts]), np.asarray(gradient)[order], atol=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), nonsense=st.sampled_from([0.0, 1e4, -np.inf, np.nan]))
def test_what_is_masked_changes_nothing(variant: str, seed: int, nonsense: float) -> None:
    """Columns before, between and behind the sampled tokens, and rows without any, whatever they hold."""
    arrays = inputs(seed)
    whole, gradient = loss_and_gradient(arrays, variant)
    places = np.sort(np.random.default_rng(seed).choice(T + 3, T, replace=False))
    wide: dict[str, Any] = {name: np.full((B + 2, T + 3), nonsense, np.float32) for name in FULL}
    for name in FULL:
        wide[name][:B, places] = np.where(arrays["mask"], arrays[name], nonsense)
    wide["advantages"] = np.append(arrays["advantages"], [nonsense, 2.0]).astype(np.float32)
    wide["mask"] = np.zeros((B + 2, T + 3), bool)
    wide["mask"][:B, places] = arrays["mask"]
    results, wide_gradient = loss_and_gradient(wide, variant)
    assert_same(whole, results)
    np.testing.assert_allclose(np.asarray(wide_gradient)[:B, places], gradient, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(wide_gradient)[~wide["mask"]], 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_any_sampled_token_all_is_zero_and_finite(variant: str) -> None:
    arrays = inputs(0)
    arrays["mask"] = np.zeros((B, T), bool)
    (total, count, statistics), gradient = loss_and_gradient(arrays, variant)
    assert (float(total), float(count)) == (0.0, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
    scalars = {name: float(scalar) for name, scalar in statistics.scalars().items()}
    assert {name for name, scalar in scalars.items() if scalar == 1.0} == {
        "ratio_min",
        "ratio_mean",
        "ratio_max",
    }
    assert all(scalar == 0.0 for name, scalar in scalars.items() if not name.startswith("ratio"))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_advantages_follow_their_rows(scale: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rewards, group = generator.random(12).astype(np.float32), generator.integers(0, 4, 12)
    order = generator.permutation(12)
    advantages, share = group_advantages(jnp.asarray(rewards), jnp.asarray(group), groups=4, scale=scale)
    shuffled, same_share = group_advantages(
        jnp.asarray(rewards[order]), jnp.asarray(group[order]), groups=4, scale=scale
    )
    np.testing.assert_allclose(np.asarray(advantages)[order], shuffled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(share, same_share)
    for g in np.unique(group):
        np.testing.assert_allclose(np.asarray(advantages)[group == g].sum(), 0, atol=1e-5)
