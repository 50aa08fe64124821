"""Chunked log-probabilities against torch's cross-entropy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from search_r3_jax.objectives.language import cross_entropy, token_log_probs


@pytest.mark.parametrize(("chunk", "temperature"), [(256, 1.0), (8, 1.0), (7, 0.6)])
def test_equals_torch(chunk: int, temperature: float) -> None:
    generator = np.random.default_rng(0)
    hidden, weight = (
        generator.standard_normal((29, 12)).astype(np.float32),
        generator.standard_normal((12, 50)).astype(np.float32),
    )
    targets, mask = generator.integers(0, 50, 29), generator.random(29) < 0.7

    def loss(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs, entropies = token_log_probs(
            lambda h: h @ jnp.asarray(weight),
            hidden,
            jnp.asarray(targets),
            temperature=temperature,
            chunk=chunk,
        )
        total, count = cross_entropy(log_probs, jnp.asarray(mask))
        return total / count, entropies

    (value, entropies), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(hidden))
    leaf = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    logits = leaf @ torch.tensor(weight, dtype=torch.float64) / temperature
    expected = torch.nn.functional.cross_entropy(
        logits[torch.tensor(mask)], torch.tensor(targets)[torch.tensor(mask)]
    )
    expected.backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(float(value), expected.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient), leaf.grad.numpy(), atol=2e-6)
    np.testing.assert_allclose(
        np.asarray(entropies),
        torch.distributions.Categorical(logits=logits).entropy().detach().numpy(),
        rtol=1e-4,
    )
