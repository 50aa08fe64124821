"""GRPO against a computation in torch, float64, with autograd: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from search_r3_jax.objectives.policy_gradient import group_advantages, grpo_loss


def test_advantages_have_mean_zero_and_the_groups_own_scale() -> None:
    rewards = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    rewards[1] = 0.4
    plain, scaled = (np.asarray(group_advantages(jnp.asarray(rewards), scale_by_std=flag)) for flag in (False, True))
    centred = rewards.astype(np.float64) - rewards.mean(-1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(plain, centred, atol=1e-7)
    np.testing.assert_allclose(scaled, centred / (rewards.astype(np.float64).std(-1, ddof=1, keepdims=True) + 1e-4), atol=2e-4)
    assert np.abs(scaled[1]).max() < 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_equal_torch(beta: float) -> None:
    generator = np.random.default_rng(1)
    B, T, clip = 6, 7, 0.2
    new, old, reference = (generator.normal(-2, 0.4, (B, T)).astype(np.float32) for _ in range(3))
    advantages = generator.standard_normal(B).astype(np.float32)
    mask = np.arange(T)[None] < generator.integers(1, T + 1, B)[:, None]

    def loss(log_probs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, count, scalars = grpo_loss(
            log_probs,
            jnp.asarray(old),
            jnp.asarray(reference) if beta else None,
            jnp.asarray(advantages),
            jnp.asarray(mask),
            clip=clip,
            beta=beta,
        )
        return total / count, scalars

    (value, scalars), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(new))

    leaf = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    t_old, t_reference, t_mask = torch.tensor(old).double(), torch.tensor(reference).double(), torch.tensor(mask)
    ratio = torch.exp(leaf - t_old)
    gain = torch.tensor(advantages).double()[:, None]
    per_token = -torch.min(ratio * gain, torch.clamp(ratio, 1 - clip, 1 + clip) * gain)
    kl = torch.exp(t_reference - leaf) - (t_reference - leaf) - 1
    per_token = per_token + beta * kl
    expected = ((per_token * t_mask).sum(-1) / t_mask.sum(-1)).mean()
    expected.backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(float(value), expected.item(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient), leaf.grad.numpy(), atol=1e-6)
    np.testing.assert_allclose(float(scalars["ratio_mean"]), ratio[t_mask].mean().item(), rtol=1e-5)
    if beta:
        np.testing.assert_allclose(float(scalars["kl"]), kl[t_mask].mean().item(), rtol=1e-5)
