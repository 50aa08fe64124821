"""The state that both stages train, its sharding, and an update that skips non-finite gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.mesh import placed
from search_r3_jax.training import sharding


class TrainState(NamedTuple):
    """The arrays that a step changes, or their shardings; a plain pytree.

    `skipped` [] int32 counts updates in a row that were not finite.
    """

    params: Any
    optimizer: Any
    skipped: Any


def state_shardings(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a state: moments like their parameters, counters replicated."""
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
    """Make the state before the first step, sharded by `shardings`.

    `copy` leaves `params` to the caller.
    """
    # Donation frees the state's arrays, which the model and the reference of the KL term still use.
    start_params = jax.tree.map(jnp.copy, params) if copy else params
    if shardings is None:
        return committed(TrainState(start_params, optimizer.init(params), jnp.zeros((), jnp.int32)))

    def start(params: nnx.State) -> tuple[Any, jax.Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32)

    params_there = jax.tree.map(placed, start_params, shardings.params)
    return TrainState(params_there, *jax.jit(start, out_shardings=shardings[1:])(params))


def committed(tree: Any) -> Any:
    """The arrays, committed to the devices where they are.

    What a step returns is committed. Arrays that are not would compile the first step's programs for
    themselves, and the second step would compile them again.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def updated(
    state: TrainState, gradients: Any, loss: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one update; also returns `gradient_norm` and `skipped_in_a_row`.

    A loss or gradient that is not finite changes neither parameters nor optimizer.
    """
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
