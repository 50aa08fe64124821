"""AdamW with warm-up, a schedule, decay of matrices alone and clipping, the same for both stages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from search_r3_jax.config import OptimizerConfig

# The share of the steps over which `wsd` falls.
WSD_DECAY = 0.2
# Weight decay applies to matrices; norms, biases and the embed token's row need their scale.
DECAYED = ("kernel", "lora_a", "lora_b", "embedding", "head")
ROWS = ("embed_row", "head_row")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule of a run of `steps` steps."""

    def decayed(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] in DECAYED, params)

    def scale_rows(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * config.row_scale if _names(path)[0] in ROWS else update, updates
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
        optax.stateless(scale_rows),
    )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up over `warmup_steps`, then the configured schedule.

    It ends at `final_share` of the peak at step `steps`.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_share
    left = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=config.final_share)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, left)
    elif config.schedule == "wsd":
        fall = max(round(left * WSD_DECAY), 1)
        after = optax.linear_schedule(peak, final, fall, transition_begin=left - fall)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, config.warmup_steps), after], [config.warmup_steps]
    )


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate [steps+1] of each update of a run of `steps`; later ones have the last."""
    return np.asarray(jax.vmap(make_schedule(config, steps))(jnp.arange(steps + 1))).astype(np.float64)


def updates_made(state: optax.OptState) -> int:
    """The updates that an optimiser has made, from its state; skipped ones are none."""
    counts = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if _names(path)[-1] == "count"
    ]
    return int(counts[0])


def _names(path: tuple[Any, ...]) -> list[str]:
    """The names along a parameter's path.

    The last key of an NNX state's leaf, `value`, is dropped.
    """
    keys = [jax.tree_util.keystr((key,)).strip("[]'.") for key in path]
    return [key for key in keys if key != "value"]
