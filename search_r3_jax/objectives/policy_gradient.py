"""Group-relative policy optimisation: advantages, clipped surrogate in four variants, KL to a reference."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo"]
KlEstimator = Literal["k1", "k2", "k3"]
RewardScale = Literal["group", "batch", "none"]


class PolicyStatistics(NamedTuple):
    """Sums [] that a micro-batch adds to the logged scalars; sums of micro-batches add exactly. A pytree.

    Attributes:
        tokens: sampled tokens.
        rows: rows with at least one.
        ratios: importance ratios: one a token, with `gspo` one a row.
        clipped_low, clipped_high: ratios below and above the clip whose gradient the clip takes away.
        zero_advantages: rows whose advantage is exactly 0.
        kl, entropy, capped: sums over tokens; None where the loss was not given what they need. `capped`
            counts truncated weights.
    """

    tokens: jax.Array
    rows: jax.Array
    ratios: jax.Array
    ratio_sum: jax.Array
    ratio_min: jax.Array
    ratio_max: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    zero_advantages: jax.Array
    kl: jax.Array | None
    entropy: jax.Array | None
    capped: jax.Array | None

    def merged(self, other: PolicyStatistics) -> PolicyStatistics:
        """The statistics of both micro-batches together."""
        return jax.tree.map(jnp.add, self, other)._replace(
            ratio_min=jnp.minimum(self.ratio_min, other.ratio_min),
            ratio_max=jnp.maximum(self.ratio_max, other.ratio_max),
        )

    def scalars(self) -> dict[str, jax.Array]:
        """Means and shares, all finite: without a sampled token the ratios are 1 and the rest 0."""
        tokens, rows, ratios = (jnp.maximum(count, 1) for count in (self.tokens, self.rows, self.ratios))
        sampled = self.ratios > 0
        values = {
            "ratio_min": jnp.where(sampled, self.ratio_min, 1.0),
            "ratio_mean": jnp.where(sampled, self.ratio_sum / ratios, 1.0),
            "ratio_max": jnp.where(sampled, self.ratio_max, 1.0),
            "clipped_low_share": self.clipped_low / ratios,
            "clipped_high_share": self.clipped_high / ratios,
            "zero_advantage_share": self.zero_advantages / rows,
        }
        if self.kl is not None:
            values["kl"] = self.kl / tokens
        if self.entropy is not None:
            values["entropy"] = self.entropy / tokens
        if self.capped is not None:
            values["importance_capped_share"] = self.capped / tokens
        return values


def policy_count(mask_bt: jax.Array, variant: Variant, *, max_tokens: int = 0) -> jax.Array:
    """The divisor of `policy_loss` for a whole batch, before it is split into micro-batches; [] float32."""
    tokens_b = jnp.sum(mask_bt, axis=-1, dtype=jnp.float32)
    if variant == "dapo":
        return jnp.sum(tokens_b)
    rows = jnp.sum(tokens_b > 0, dtype=jnp.float32)
    return rows * max_tokens if variant == "dr_grpo" else rows


def group_advantages(
    rewards_b: jax.Array,
    group_id_b: jax.Array,
    *,
    groups: int,
    scale: RewardScale = "group",
    eps: float = 1e-4,
) -> tuple[jax.Array, jax.Array]:
    """Advantages [B], and the share [] of groups whose rewards are all equal.

    Rows may be in any order and groups of any size. An advantage is the reward minus the mean of its group,
    over (sample standard deviation + eps) of the group, of the whole batch, or neither. `group_id_b` int32 in
    0 … groups − 1. Rows of a group of equal rewards, or of one row, get exactly 0. Call it on the whole
    batch, before it is split into micro-batches.
    """
    dtype = jnp.promote_types(rewards_b.dtype, jnp.float32)
    rewards_b = rewards_b.astype(dtype)

    def group_sums(values_b: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_b, group_id_b, groups)

    size_g = group_sums(jnp.ones_like(rewards_b))
    highest_g = jax.ops.segment_max(rewards_b, group_id_b, groups)
    lowest_g = jax.ops.segment_min(rewards_b, group_id_b, groups)
    # Not by the deviation: rounding of the mean can make it positive, and scaling would amplify that.
    constant_g = highest_g == lowest_g
    # Differences of close rewards are exact, so their mean stays accurate when scaled by a small
    # deviation.
    above_b = rewards_b - lowest_g[group_id_b]
    centred_b = above_b - (group_sums(above_b) / jnp.maximum(size_g, 1))[group_id_b]
    if scale == "group":
        deviation_g = jnp.sqrt(group_sums(centred_b**2) / jnp.maximum(size_g - 1, 1))
        centred_b = centred_b / (deviation_g[group_id_b] + eps)
    elif scale == "batch":
        around_mean_b = rewards_b - jnp.mean(rewards_b)
        centred_b = centred_b / (jnp.sqrt(jnp.sum(around_mean_b**2) / max(len(rewards_b) - 1, 1)) + eps)
    elif scale != "none":
        raise ValueError(f"unknown scale of rewards {scale!r}")
    share = jnp.sum(constant_g) / jnp.maximum(jnp.sum(size_g > 0), 1)
    return jnp.where(constant_g[group_id_b], 0, centred_b), share.astype(dtype)


def policy_loss(
    log_probs_bt: jax.Array,
    advantages_b: jax.Array,
    mask_bt: jax.Array,
    *,
    variant: Variant = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_tokens: int = 0,
    old_log_probs_bt: jax.Array | None = None,
    reference_log_probs_bt: jax.Array | None = None,
    beta: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    sampler_log_probs_bt: jax.Array | None = None,
    importance_cap: float = 0.0,
    entropies_bt: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, PolicyStatistics]:
    """`(sum [], count [], statistics)` of the clipped surrogate plus β·KL.

    The loss of a batch is Σ sums / Σ counts of its micro-batches.

    A token's loss is −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) · w + β·KL, with r = exp(log_probs −
    old_log_probs).
      grpo (arXiv 2402.03300): mean over each row's tokens; count = rows. dr_grpo (2503.20783): sum over
      tokens; count = rows · `max_tokens`, the budget of a reply, so that length earns nothing. dapo
      (2503.14476): sum over tokens; count = tokens. Clip-higher is `clip_high` above `clip_low`. gspo
      (2507.18071): one r a row, exp of the mean log-ratio of its tokens; aggregated as grpo; clips are far
      tighter, about 3e-4.
    `mask_bt` bool is true on tokens that the policy sampled: never on prompt, padding or forced tokens, and
    the values there are ignored. Rows without any count as nothing, so that they may pad a micro-batch; where
    no row has any, sum and count are 0. `old_log_probs_bt`: of the first pass over the batch; None takes the
    current ones, stopped, so that r is 1 with r's gradient. `reference_log_probs_bt` is needed if β > 0; with
    β = 0 it is measured alone. `sampler_log_probs_bt` with `importance_cap` > 0 weighs the surrogate, not the
    KL, by w = min(exp(old − sampler), cap) without gradient (truncated importance sampling): what drew the
    tokens need not compute exactly what is trained. Raises ValueError on an unknown variant or estimator, β
    without a reference, `dr_grpo` without `max_tokens`, a cap without log-probabilities of the sampler or the
    reverse, and clips outside of 0 ≤ clip_low < 1, 0 ≤ clip_high.
    """
    if (sampler_log_probs_bt is None) != (importance_cap <= 0):
        raise ValueError(f"importance_cap {importance_cap}: goes together with the sampler's log-probs")
    _check_weights(variant, max_tokens, clip_low, clip_high, beta, reference_log_probs_bt)
    dtype = jnp.promote_types(log_probs_bt.dtype, jnp.float32)
    mask_bt = mask_bt.astype(bool)
    counted_bt = mask_bt.astype(dtype)
    tokens_b = jnp.sum(counted_bt, axis=-1)
    rows_b = (tokens_b > 0).astype(dtype)

    def sampled(values_bt: jax.Array) -> jax.Array:
        # Before anything is computed with them: 0 · NaN in a gradient is NaN.
        return jnp.where(mask_bt, values_bt, 0).astype(dtype)

    def token_sum(values_bt: jax.Array) -> jax.Array:
        return jnp.sum(values_bt * counted_bt)

    # The ratio and its clip: of shape [B,T], with gspo [B,1].
    current_bt = sampled(log_probs_bt)
    old_bt = jax.lax.stop_gradient(current_bt if old_log_probs_bt is None else sampled(old_log_probs_bt))
    log_ratio, weight = current_bt - old_bt, counted_bt
    if variant == "gspo":
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(tokens_b, 1)[:, None]
        weight = rows_b[:, None]
    ratio = jnp.exp(log_ratio)
    advantages = jnp.where(rows_b > 0, advantages_b, 0).astype(dtype)[:, None]
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    loss_bt = jnp.broadcast_to(-surrogate, mask_bt.shape)

    capped = kl = None
    if sampler_log_probs_bt is not None:
        drift_bt = jnp.exp(old_bt - sampled(sampler_log_probs_bt))
        loss_bt = loss_bt * jax.lax.stop_gradient(jnp.minimum(drift_bt, importance_cap))
        capped = token_sum(drift_bt > importance_cap)
    if reference_log_probs_bt is not None:
        kl_bt = kl_to_reference(current_bt, sampled(reference_log_probs_bt), kl_estimator)
        kl = token_sum(kl_bt)
        if beta:
            loss_bt = loss_bt + beta * kl_bt

    statistics = PolicyStatistics(
        tokens=jnp.sum(tokens_b),
        rows=jnp.sum(rows_b),
        **_ratio_statistics(ratio, weight, advantages, clip_low, clip_high),
        zero_advantages=jnp.sum((advantages[:, 0] == 0) * rows_b),
        kl=kl,
        entropy=None if entropies_bt is None else token_sum(sampled(entropies_bt)),
        capped=capped,
    )
    count = policy_count(mask_bt, variant, max_tokens=max_tokens).astype(dtype)
    if variant in ("grpo", "gspo"):
        return jnp.sum(jnp.sum(loss_bt * counted_bt, axis=-1) / jnp.maximum(tokens_b, 1)), count, statistics
    return token_sum(loss_bt), count, statistics


def _ratio_statistics(
    ratio: jax.Array, weight: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> dict[str, jax.Array]:
    """The statistics of the ratios, [B,T] or with gspo [B,1]; `weight` is 1 where a ratio counts, else 0."""
    return {
        "ratios": jnp.sum(weight),
        "ratio_sum": jnp.sum(ratio * weight),
        "ratio_min": jnp.min(jnp.where(weight > 0, ratio, jnp.inf)),
        "ratio_max": jnp.max(jnp.where(weight > 0, ratio, -jnp.inf)),
        "clipped_low": jnp.sum(((ratio < 1 - clip_low) & (advantages < 0)) * weight),
        "clipped_high": jnp.sum(((ratio > 1 + clip_high) & (advantages > 0)) * weight),
    }


def _check_weights(
    variant: Variant,
    max_tokens: int,
    clip_low: float,
    clip_high: float,
    beta: float,
    reference_log_probs_bt: jax.Array | None,
) -> None:
    if variant not in ("grpo", "dr_grpo", "dapo", "gspo"):
        raise ValueError(f"unknown variant {variant!r} of the policy loss")
    if beta and reference_log_probs_bt is None:
        raise ValueError(f"beta {beta} needs the reference's log-probabilities")
    if variant == "dr_grpo" and max_tokens < 1:
        raise ValueError(f"dr_grpo: max_tokens {max_tokens} must be the budget of a reply")
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(f"clip_low {clip_low} must be in [0, 1) and clip_high {clip_high} at least 0")


def kl_to_reference(
    log_probs: jax.Array, reference_log_probs: jax.Array, estimator: KlEstimator
) -> jax.Array:
    """KL(policy ‖ reference) of each sampled token, any shape, by one of Schulman's estimators.

    Source: joschu.net/blog/kl-approx.html.

    With d = log_probs − reference: k1 = d, k2 = d²/2, k3 = exp(−d) + d − 1. As a loss on tokens that the
    policy drew itself, k2 has the expected gradient of the KL; that of k1 is 0 and that of k3 is near it
    while the two are close.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return jnp.exp(-difference) + difference - 1
    raise ValueError(f"unknown estimator {estimator!r} of the KL")
