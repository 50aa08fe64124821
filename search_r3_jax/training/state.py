"""What both stages' steps change, where it lies on a mesh, and an update that leaves it alone when a gradient
is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.training import sharding


class TrainState(NamedTuple):
    """What a step changes, or where each of it lies; a plain pytree. `skipped` [] int32: updates in a row
    that were not finite."""

    params: Any
    optimizer: Any
    skipped: Any


def state_shardings(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where a state lies on a mesh, as a state of shardings: moments with their parameters, counters
    everywhere."""
    of_params = sharding.params_shardings(params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding_of: sharding_of,
        jax.eval_shape(optimizer.init, params),
        of_params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(of_params, moments, everywhere)


def init_state(
    params: nnx.State,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    *,
    copy: bool = False,
) -> TrainState:
    """The state before the first step, each array made where `shardings` wants it; `copy` leaves `params` to
    the caller."""
    # A donated state takes its arrays with it, which the model and the reference of the KL term still hold.
    start_params = jax.tree.map(jnp.copy, params) if copy else params
    if shardings is None:
        return TrainState(start_params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def start(params: nnx.State) -> tuple[Any, jax.Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32)

    return TrainState(
        jax.device_put(start_params, shardings.params), *jax.jit(start, out_shardings=shardings[1:])(params)
    )


def updated(
    state: TrainState, gradients: Any, loss: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and `gradient_norm`, `skipped_in_a_row`; a loss or gradient that is not
    finite changes nothing."""
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    params, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, optimizer_state),
        (state.params, state.optimizer),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    return TrainState(params, optimizer_state, skipped), {"gradient_norm": norm, "skipped_in_a_row": skipped}
