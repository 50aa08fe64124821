"""The choice of a token against `transformers`' warpers (torch) and against probabilities in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from search_r3_jax.rollout.token_sampling import sample_token, warp

# Of half a million draws, running is most of the time, not compiling.
pytestmark = pytest.mark.usefixtures("optimised")

V = 700
SETTINGS = [(0, 0.9), (0, 0.3), (5, 1.0), (40, 0.8), (5, 0.2), (1, 0.5), (0, 1e-6), (V + 50, 0.95), (0, 1.0)]


def ids(rows: int) -> Any:
    """Tokens before, which these warpers do not look at. Any: `transformers` asks for the class of one
    dtype."""
    return torch.zeros(rows, 1, dtype=torch.long)


def logits(rows: int, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(rows).standard_normal((rows, V))).astype(np.float32)


@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_warping_equals_transformers_in_its_order(temperature: float, top_k: int, top_p: float) -> None:
    given = logits(33)
    scores = TemperatureLogitsWarper(temperature)(ids(33), torch.from_numpy(given.copy()))
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids(33), scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids(33), scores)
    ours = np.asarray(warp(jnp.asarray(given) / temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(scores).numpy())
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)


def test_top_k_keeps_ties_as_transformers_does() -> None:
    given = np.array([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    theirs = TopKLogitsWarper(2)(ids(1), torch.from_numpy(given))
    np.testing.assert_array_equal(np.asarray(warp(jnp.asarray(given), top_k=2, top_p=1.0)), theirs.numpy())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.8, 30, 0.7),
        # Each setting alone.
        *(
            pytest.param(*alone, marks=pytest.mark.slow)
            for alone in ((0.7, 0, 1.0), (1.0, 20, 1.0), (0.8, 0, 0.8), (1.0, 30, 0.7))
        ),
    ],
)
def test_draws_follow_the_warped_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square of many draws; the last tokens are in a block that is not full, and one column is −inf."""
    n = 20000
    one = logits(1, 1.5)
    one[0, 13] = -np.inf
    given = jnp.broadcast_to(jnp.asarray(one), (n, V))
    keys = jax.random.split(jax.random.key(0), n)
    choice = jax.jit(lambda *a: sample_token(*a, temperature=temperature, top_k=top_k, top_p=top_p))(
        given, keys, jnp.zeros(n, jnp.int32)
    )
    kept = np.asarray(warp(jnp.asarray(one) / temperature, top_k=top_k, top_p=top_p))[0].astype(np.float64)
    expected = np.exp(kept - kept.max())
    expected /= expected.sum()
    counts = np.bincount(np.asarray(choice.token), minlength=V)
    assert counts.shape == (V,)
    assert (counts[expected == 0] == 0).all()
    big = expected * n >= 5
    rest, rest_expected = counts[~big].sum(), expected[~big].sum() * n
    statistic = ((counts[big] - expected[big] * n) ** 2 / (expected[big] * n)).sum() + (
        rest - rest_expected
    ) ** 2 / max(rest_expected, 1)
    assert abs(statistic - big.sum()) < 5 * np.sqrt(2 * big.sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_prob_and_entropy_are_of_the_whole_vocabulary_whatever_is_left_out(temperature: float) -> None:
    given = logits(50)
    given[:, 5] = -np.inf
    keys = jax.random.split(jax.random.key(0), 50)
    choice = sample_token(
        jnp.asarray(given), keys, jnp.arange(50), temperature=temperature, top_k=3, top_p=0.9
    )
    exact = given.astype(np.float64) / (temperature or 1.0)
    exact -= exact.max(-1, keepdims=True)
    probabilities = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    token = np.asarray(choice.token)
    np.testing.assert_allclose(
        np.asarray(choice.log_prob), np.log(probabilities[np.arange(50), token]), atol=1e-5
    )
    plain = np.where(probabilities > 0, probabilities, 1.0)
    np.testing.assert_allclose(np.asarray(choice.entropy), -(plain * np.log(plain)).sum(-1), atol=1e-5)
    if temperature == 0:
        np.testing.assert_array_equal(token, given.argmax(-1))


def test_a_row_is_drawn_alone_and_the_last_digits_hardly_turn_it() -> None:
    """The same rows in another order and number give the same tokens; noise of float32 rounding turns next to
    none."""
    given, n = logits(4000, 1.0), 4000
    keys, steps = jax.random.split(jax.random.key(3), n), jnp.arange(n) % 7
    draw = jax.jit(lambda *a: sample_token(*a, temperature=1.0, top_k=0, top_p=1.0).token)
    tokens = np.asarray(draw(jnp.asarray(given), keys, steps))
    order = np.random.default_rng(0).permutation(n)[:777]
    np.testing.assert_array_equal(
        np.asarray(draw(jnp.asarray(given[order]), keys[order], steps[order])), tokens[order]
    )
    noisy = given + 1e-5 * np.random.default_rng(1).standard_normal(given.shape).astype(np.float32)
    assert (np.asarray(draw(jnp.asarray(noisy), keys, steps)) != tokens).sum() <= 2
    # Another number of the token is another draw.
    assert (np.asarray(draw(jnp.asarray(given), keys, steps + 1)) != tokens).mean() > 0.9
