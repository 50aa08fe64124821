"""The update rule: the embed token's row moves faster by just its factor, and the rate follows its schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.config import OptimizerConfig
from search_r3_jax.training.optimizer import make_optimizer


def test_only_the_rows_are_scaled() -> None:
    layers = {"q": {"lora_a": jnp.ones((2, 2)), "embed_row": jnp.ones(2)}}
    params: Any = {"embed_row": jnp.ones(4), "head_row": jnp.ones(3), "layers": layers}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    plain, scaled = (make_optimizer(OptimizerConfig(learning_rate=1e-3, row_scale=scale), 10) for scale in (1.0, 10.0))
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
