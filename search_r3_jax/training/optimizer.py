"""AdamW with warm-up, cosine decay and clipping, the same for both stages."""

from __future__ import annotations

from typing import Any

import jax
import optax

from search_r3_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule of a run of `steps` steps; the learning rate ends at a tenth of its peak."""
    peak = config.learning_rate
    if config.warmup_steps > 0:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, max(steps, config.warmup_steps + 1), peak / 10)
    else:
        schedule = optax.cosine_decay_schedule(peak, max(steps, 1), alpha=0.1)

    def scale_rows(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            is_row = jax.tree_util.keystr(path[:1]).strip("[]'.") in ("embed_row", "head_row")
            return update * config.row_scale if is_row else update

        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=config.weight_decay),
        optax.stateless(scale_rows),
    )
