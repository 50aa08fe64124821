"""The policy loss and its gradient against trl's own `GRPOTrainer._compute_loss`; what trl computes elsewhere
is restated in torch."""

import importlib.metadata
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from search_r3_jax.objectives.policy_gradient import group_advantages, kl_to_reference, policy_loss

B, T, MAX_TOKENS, CAP = 6, 7, 9, 1.1
# trl's names of ours: how it aggregates, and at which level it takes the ratio.
TRL = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
}
CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6)]


def test_what_is_restated_here_was_read_in_this_version_of_trl() -> None:
    """Advantages, truncated weights, k1 and k2: on another version, read `_generate_and_score_completions`
    again."""
    assert importlib.metadata.version("trl") == "1.16.0"


def inputs(seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        name: generator.normal(-2, 0.4, (B, T)) for name in ("current", "old", "reference", "sampler")
    }
    arrays["entropies"] = generator.uniform(0.1, 3, (B, T))
    arrays["advantages"] = generator.standard_normal(B)
    arrays["advantages"][2] = 0.0
    arrays["mask"] = (np.arange(T)[None] < generator.integers(1, T + 1, B)[:, None]) & (
        generator.random((B, T)) < 0.8
    )
    arrays["mask"][:, 0] = True
    return arrays


def by_trl(
    arrays: dict[str, np.ndarray],
    dtype: Any,
    *,
    variant: str,
    clips: tuple[float, float],
    beta: float,
    estimator: str,
    old: bool,
    cap: float,
) -> tuple[float, np.ndarray, dict[str, list[float]]]:
    """Loss, gradient and metrics of trl's method on a stub; k1 and k2, which it has not, are added as it adds
    its k3."""
    tensors = {
        name: torch.tensor(array if name == "mask" else array.astype(dtype)) for name, array in arrays.items()
    }
    leaf, mask = tensors["current"].clone().requires_grad_(), tensors["mask"].to(tensors["current"].dtype)
    weights = torch.ones_like(leaf)
    if cap:
        at_sampling = tensors["old"] if old else leaf.detach()
        weights = torch.clamp(torch.exp((at_sampling - tensors["sampler"]) * mask), max=cap)
    loss_type, level = TRL[variant]
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, tensors["entropies"], None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta if estimator == "k3" else 0.0,
        epsilon_low=clips[0],
        epsilon_high=clips[1],
        use_vllm=cap > 0,
        vllm_importance_sampling_correction=cap > 0,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    empty = torch.zeros((B, 0), dtype=torch.int64)
    batch = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros((B, T), dtype=torch.int64),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old"] if old else None,
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": weights,
        "num_items_in_batch": mask.sum(),
    }
    trainer: Any = GRPOTrainer
    loss = trainer._compute_loss(stub, stub.model, batch)
    if beta and estimator != "k3":
        difference = leaf - tensors["reference"]
        kl = (difference if estimator == "k1" else 0.5 * difference * difference) * mask
        if variant == "dapo":
            loss = loss + beta * kl.sum() / mask.sum()
        elif variant == "dr_grpo":
            loss = loss + beta * kl.sum() / (B * MAX_TOKENS)
        else:
            loss = loss + beta * (kl.sum(-1) / mask.sum(-1)).mean()
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad.numpy(), stub._metrics["train"]


def ours(
    arrays: dict[str, np.ndarray],
    dtype: Any,
    *,
    variant: Any,
    clips: tuple[float, float],
    beta: float,
    estimator: Any,
    old: bool,
    cap: float,
) -> tuple[float, np.ndarray, dict[str, float]]:
    given = {
        name: jnp.asarray(array if name == "mask" else array.astype(dtype)) for name, array in arrays.items()
    }

    def loss(log_probs: jax.Array):
        total, count, statistics = policy_loss(
            log_probs,
            given["advantages"],
            given["mask"],
            variant=variant,
            clip_low=clips[0],
            clip_high=clips[1],
            max_tokens=MAX_TOKENS,
            old_log_probs_bt=given["old"] if old else None,
            reference_log_probs_bt=given["reference"] if beta else None,
            beta=beta,
            kl_estimator=estimator,
            sampler_log_probs_bt=given["sampler"] if cap else None,
            importance_cap=cap,
            entropies_bt=given["entropies"],
        )
        return total / count, statistics.scalars()

    (value, scalars), gradient = jax.value_and_grad(loss, has_aux=True)(given["current"])
    assert gradient.dtype == dtype
    return float(value), np.asarray(gradient), {name: float(scalar) for name, scalar in scalars.items()}


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(("beta", "estimator"), [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
@pytest.mark.parametrize("variant", list(TRL))
def test_loss_and_gradient_equal_trl(
    variant: str, beta: float, estimator: str, clips: tuple[float, float]
) -> None:
    arrays = inputs()
    with jax.enable_x64(True):
        for dtype, old, cap in [(np.float64, True, CAP), (np.float32, True, 0.0), (np.float32, False, CAP)]:
            setting: dict[str, Any] = {
                "variant": variant,
                "clips": clips,
                "beta": beta,
                "estimator": estimator,
                "old": old,
                "cap": cap,
            }
            expected, expected_gradient, metrics = by_trl(arrays, dtype, **setting)
            value, gradient, scalars = ours(arrays, dtype, **setting)
            tolerance = 1e-6 if dtype is np.float32 else 1e-12
            np.testing.assert_allclose(value, expected, atol=tolerance, rtol=0)
            np.testing.assert_allclose(gradient, expected_gradient, atol=tolerance, rtol=0)
            assert np.abs(gradient).max() > 1e-3
            np.testing.assert_allclose(
                scalars["clipped_low_share"], metrics["clip_ratio/low_mean"][0], atol=1e-6
            )
            np.testing.assert_allclose(
                scalars["clipped_high_share"], metrics["clip_ratio/high_mean"][0], atol=1e-6
            )
            np.testing.assert_allclose(scalars["entropy"], metrics["entropy"][0], rtol=1e-6)
            if beta and estimator == "k3":
                np.testing.assert_allclose(scalars["kl"], metrics["kl"][0], rtol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls(scale: Any) -> None:
    generator = np.random.default_rng(0)
    rewards = generator.random((4, 5)).astype(np.float32)
    rewards[1] = 0.4
    order = generator.permutation(20)
    mine, share = group_advantages(
        jnp.asarray(rewards.reshape(-1)[order]), jnp.asarray(order // 5), groups=4, scale=scale
    )
    tensor = torch.tensor(rewards)
    centred = tensor - tensor.mean(1, keepdim=True)
    deviation = {
        "group": nanstd(tensor, dim=1)[:, None],
        "batch": nanstd(tensor),
        "none": torch.tensor(1 - 1e-4),
    }[scale]
    expected = (centred / (deviation + 1e-4)).reshape(-1).numpy()[order]
    np.testing.assert_allclose(mine, np.where(order // 5 == 1, 0, expected), atol=2e-6)
    assert float(share) == 0.25
    np.testing.assert_array_equal(np.asarray(mine)[order // 5 == 1], 0.0)


def test_a_constant_group_gets_exactly_zero_however_its_mean_is_rounded() -> None:
    rewards = np.random.default_rng(0).random(50).astype(np.float32).repeat(7)
    advantages, share = group_advantages(
        jnp.asarray(rewards), jnp.asarray(np.arange(50).repeat(7)), groups=50
    )
    np.testing.assert_array_equal(advantages, 0.0)
    assert float(share) == 1.0


def test_groups_of_unequal_size() -> None:
    rewards, group = np.array([0.1, 0.9, 0.3, 0.5, 0.25, 0.7]), np.array([2, 0, 2, 0, 2, 1])
    advantages, share = group_advantages(jnp.asarray(rewards, jnp.float32), jnp.asarray(group), groups=5)
    for g in (0, 2):
        own = rewards[group == g]
        np.testing.assert_allclose(
            np.asarray(advantages)[group == g], (own - own.mean()) / (own.std(ddof=1) + 1e-4), rtol=1e-4
        )
    assert float(advantages[5]) == 0
    # Groups 3 and 4 have no rows: they are no groups.
    np.testing.assert_allclose(float(share), 1 / 3, rtol=1e-6)


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient() -> None:
    arrays = inputs()
    value, gradient, scalars = ours(
        arrays, np.float32, variant="dapo", clips=(0.2, 0.2), beta=0.0, estimator="k3", old=False, cap=0.0
    )
    mask, advantages = arrays["mask"].astype(float), arrays["advantages"]
    assert (scalars["ratio_min"], scalars["ratio_mean"], scalars["ratio_max"]) == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(gradient, -mask * advantages[:, None] / mask.sum(), atol=1e-7)
    np.testing.assert_allclose(value, -(mask * advantages[:, None]).sum() / mask.sum(), atol=1e-6)
    np.testing.assert_allclose(scalars["zero_advantage_share"], 1 / B, rtol=1e-6)


def test_the_weight_of_a_token_is_capped_and_has_no_gradient() -> None:
    current = jnp.log(jnp.array([[0.5, 0.2, 0.6]]))
    sampler = jnp.log(jnp.array([[0.25, 0.4, 0.5]]))

    def loss(log_probs: jax.Array, sampler: jax.Array):
        total, count, statistics = policy_loss(
            log_probs,
            jnp.array([1.0]),
            jnp.ones((1, 3), bool),
            variant="dapo",
            sampler_log_probs_bt=sampler,
            importance_cap=1.5,
        )
        return total / count, statistics.scalars()["importance_capped_share"]

    (value, share), (gradient, to_sampler) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        current, sampler
    )
    np.testing.assert_allclose(gradient, -np.array([[1.5, 0.5, 1.2]]) / 3, rtol=1e-5)
    np.testing.assert_allclose(to_sampler, 0)
    np.testing.assert_allclose(float(value), -(1.5 + 0.5 + 1.2) / 3, rtol=1e-5)
    np.testing.assert_allclose(float(share), 1 / 3, rtol=1e-6)


def test_estimators_agree_with_the_kl_on_average() -> None:
    """Weighed by the policy over all tokens: k1 and k3 are the KL; the gradient of k2 is the KL's, that of k1
    is 0."""
    with jax.enable_x64(True):
        logits, other = (jnp.asarray(np.random.default_rng(seed).normal(size=12)) for seed in (0, 1))
        reference = jax.nn.log_softmax(other)

        def expected(logits: jax.Array, estimator: Any) -> jax.Array:
            log_probs = jax.nn.log_softmax(logits)
            return jnp.sum(
                jax.lax.stop_gradient(jnp.exp(log_probs)) * kl_to_reference(log_probs, reference, estimator)
            )

        def kl(logits: jax.Array) -> jax.Array:
            log_probs = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(log_probs) * (log_probs - reference))

        for estimator in ("k1", "k3"):
            np.testing.assert_allclose(expected(logits, estimator), kl(logits), rtol=1e-10)
        np.testing.assert_allclose(jax.grad(expected)(logits, "k2"), jax.grad(kl)(logits), atol=1e-12)
        np.testing.assert_allclose(jax.grad(expected)(logits, "k1"), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.1}, "beta"),
        ({"variant": "dr_grpo"}, "max_tokens"),
        ({"importance_cap": 2.0}, "importance_cap"),
        ({"clip_low": 1.0}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"variant": "nonsense"}, "variant"),
        ({"kl_estimator": "k4", "reference_log_probs_bt": jnp.zeros((1, 2))}, "estimator"),
    ],
)
def test_refuses_nonsense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool), **wrong)


def test_refuses_an_unknown_scale() -> None:
    scale: Any = "nonsense"
    with pytest.raises(ValueError, match="scale"):
        group_advantages(jnp.ones(2), jnp.zeros(2, jnp.int32), groups=1, scale=scale)
