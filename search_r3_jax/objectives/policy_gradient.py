"""Group-relative policy optimisation (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def group_advantages(rewards_qg: jax.Array, *, scale_by_std: bool, eps: float = 1e-4) -> jax.Array:
    """Advantages [Q,G] float32: reward minus the group's mean, over its sample standard deviation plus eps where asked."""
    centred = rewards_qg - jnp.mean(rewards_qg, axis=-1, keepdims=True)
    if not scale_by_std:
        return centred
    return centred / (jnp.std(rewards_qg, axis=-1, ddof=1, keepdims=True) + eps)


def grpo_loss(
    log_probs_bt: jax.Array,
    old_log_probs_bt: jax.Array,
    reference_log_probs_bt: jax.Array | None,
    advantages_b: jax.Array,
    mask_bt: jax.Array,
    *,
    clip: float,
    beta: float,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """`(sum, count, scalars)`: the clipped surrogate with k3 KL, averaged over each sequence's tokens; count is B.

    `mask_bt` is 1 on tokens that the policy sampled: never on prompt, padding or forced tokens. A row without any counts as 0.
    """
    mask = mask_bt.astype(jnp.float32)
    ratio = jnp.exp(jnp.where(mask_bt, log_probs_bt - old_log_probs_bt, 0.0))
    advantages = advantages_b[:, None]
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    token_loss = -surrogate
    tokens = jnp.maximum(jnp.sum(mask), 1.0)
    scalars = {
        "ratio_mean": jnp.sum(ratio * mask) / tokens,
        "ratio_min": jnp.min(jnp.where(mask_bt, ratio, jnp.inf)),
        "ratio_max": jnp.max(jnp.where(mask_bt, ratio, -jnp.inf)),
        "clipped_share": jnp.sum((jnp.abs(ratio - 1) > clip) * mask) / tokens,
    }
    if reference_log_probs_bt is not None:
        difference = jnp.where(mask_bt, reference_log_probs_bt - log_probs_bt, 0.0)
        kl = jnp.exp(difference) - difference - 1
        token_loss += beta * kl
        scalars["kl"] = jnp.sum(kl * mask) / tokens
    per_row = jnp.sum(token_loss * mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)
    return jnp.sum(per_row), jnp.asarray(log_probs_bt.shape[0], jnp.float32), scalars
