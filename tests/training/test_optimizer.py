"""The update rule: the embed token's row moves faster by just its factor, matrices alone decay, and the rate
follows its schedule."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.tiny_models import CONFIG

from search_r3_jax.config import LoraConfig, OptimizerConfig
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.training.optimizer import make_optimizer, make_schedule


@pytest.mark.slow
def test_only_the_rows_are_scaled() -> None:
    layers = {"q": {"lora_a": jnp.ones((2, 2)), "embed_row": jnp.ones(2)}}
    params: Any = {"embed_row": jnp.ones(4), "head_row": jnp.ones(3), "layers": layers}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    plain, scaled = (
        make_optimizer(OptimizerConfig(learning_rate=1e-3, row_scale=scale), 10) for scale in (1.0, 10.0)
    )
    one: Any = plain.update(gradients, plain.init(params), params)[0]
    ten: Any = scaled.update(gradients, scaled.init(params), params)[0]
    for row in ("embed_row", "head_row"):
        np.testing.assert_allclose(ten[row], 10 * one[row], rtol=1e-6)
    for name in ("lora_a", "embed_row"):
        np.testing.assert_array_equal(ten["layers"]["q"][name], one["layers"]["q"][name])


def test_warm_up_then_cosine_to_a_tenth() -> None:
    steps = 20
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=4, clip_norm=1e9), steps)
    params: Any = {"w": jnp.zeros(1)}
    state, sizes = optimizer.init(params), []
    for _ in range(steps + 1):
        updates: Any
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        sizes.append(-float(updates["w"][0]))
    # With a constant gradient Adam's step is the learning rate itself.
    expected = [1e-2 * t / 4 for t in range(4)]
    expected += [1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * t / (steps - 4))) / 2) for t in range(steps - 4 + 1)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4, atol=1e-8)


def test_schedules() -> None:
    def rates(schedule: Literal["cosine", "linear", "constant", "wsd"], warmup: int = 0) -> list[float]:
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, final_share=0.2, warmup_steps=warmup)
        rate = make_schedule(config, 20 + warmup)
        return [float(np.asarray(rate(step))) for step in range(21 + warmup)]

    np.testing.assert_allclose(rates("linear"), [1 - 0.8 * t / 20 for t in range(21)], rtol=1e-5)
    np.testing.assert_allclose(rates("constant"), [1.0] * 21)
    np.testing.assert_allclose(rates("wsd"), [1.0] * 17 + [0.8, 0.6, 0.4, 0.2], rtol=1e-5)
    np.testing.assert_allclose(rates("wsd", warmup=5), [t / 5 for t in range(5)] + rates("wsd"), rtol=1e-5)


@pytest.mark.slow
def test_only_matrices_decay() -> None:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), lora=LoraConfig(rank=2), embed_id=3)
    params = nnx.state(model, nnx.Param)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    # With no gradient, decay is all that moves a parameter.
    updates: Any = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
    moved = {}
    for (path, update), (_, old) in zip(nnx.to_flat_state(updates), nnx.to_flat_state(params), strict=True):
        share = np.asarray(update[...]) + 0.05 * np.asarray(old[...])
        moved[path] = bool(np.any(np.asarray(update[...])))
        assert not moved[path] or np.abs(share).max() < 1e-6
    still = {path[-2] if path[-1] == "scale" else path[-1] for path, does in moved.items() if not does}
    # The second factor of an adapter starts at zero, where decay has nothing to pull at.
    assert still == {"attention_norm", "feed_forward_norm", "final_norm", "embed_row", "lora_b"}


def test_no_clipping_at_zero() -> None:
    for clip_norm, expected in ((0.0, 100.0), (1.0, 1.0)):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), 10)
        params: Any = {"w": jnp.zeros(1)}
        state: Any = optimizer.update({"w": jnp.full(1, 100.0)}, optimizer.init(params), params)[1]
        first_moment = optax.tree.get(state, "mu")["w"]
        np.testing.assert_allclose(first_moment, 0.1 * expected, rtol=1e-5)
