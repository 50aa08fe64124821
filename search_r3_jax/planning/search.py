"""Search of the best program: the largest chunk that fits into memory, and sensible meshes."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

from search_r3_jax.config import MeshConfig, RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.planning.models import planned_model
from search_r3_jax.planning.plan import Plan, Slice, make_plan
from search_r3_jax.planning.stages import Stage

# With more chips per layer, tensor parallelism exchanges more than it computes.
_MOST_TENSOR = 8
# The setting that bounds what a stage holds at a time.
_CHUNK = {"sft": "sft.encode_chunk", "rl": "rl.micro_queries"}
logger = logging.getLogger(__name__)


def largest_chunk(config: RunConfig, stage: Stage, slices: Slice) -> Plan:
    """The plan with the largest `sft.encode_chunk`, or `rl.micro_queries`, that fits.

    The global batch does not change. Raises UserError when not even one row per chip fits, and for a stage
    without such a setting.
    """
    whole, changed = _chunked(config, stage)
    # Binary search over the divisors of the batch.
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    low, high, best = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high) // 2
        plan = _tried(changed(sizes[middle]), stage, slices)
        fits = plan is not None and plan.fits
        logger.info(
            f"{_CHUNK[stage]} {sizes[middle]}: "
            + (
                "too large"
                if plan is None
                else f"{plan.hbm_used / 2**30:.2f} of {plan.hbm_limit / 2**30:.2f} GiB a chip"
            )
        )
        if fits:
            low, best = middle + 1, plan
        else:
            high = middle - 1
    if best is None:
        raise UserError(
            f"{stage} on {slices.topology}: not even {_CHUNK[stage]} {sizes[0]} fits; take more chips, or "
            "adapters (--lora.rank 16)"
        )
    return best


def try_meshes(config: RunConfig, stage: Stage, slices: Slice) -> list[tuple[MeshConfig, Plan | None]]:
    """Each sensible mesh with its plan, None if it does not fit; sorted by fit, then by speed."""
    tried = list[tuple[MeshConfig, Plan | None]]()
    for mesh in sensible_meshes(config, slices):
        plan = _tried(dataclasses.replace(config, mesh=mesh), stage, slices)
        logger.info(
            f"{_named(mesh)}: "
            + ("does not fit" if plan is None else f"{plan.tokens_per_second:,.0f} tokens/s at most")
        )
        tried.append((mesh, plan))
    return sorted(
        tried,
        key=lambda pair: (
            pair[1] is None,
            pair[1] is not None and not pair[1].fits,
            -pair[1].tokens_per_second if pair[1] else 0,
        ),
    )


def sensible_meshes(config: RunConfig, slices: Slice) -> list[MeshConfig]:
    """Meshes that divide the model: fully sharded, with copies of shards, or with tensor parallelism."""
    chips = len(slices.devices) // slices.slices
    model = planned_model(config, adapters=False).decoder.config
    heads = math.gcd(model.heads, model.kv_heads, model.feed_forward, model.vocab_size)
    meshes = []
    for tensor in (size for size in (1, 2, 4, _MOST_TENSOR) if chips % size == 0 and heads % size == 0):
        for data in (size for size in (1, 2, 4) if (chips // tensor) % size == 0):
            fsdp = chips // tensor // data
            if model.hidden_size % fsdp == 0 and (fsdp > 1 or data == 1):
                meshes.append(MeshConfig(slice=slices.slices, data=data, fsdp=fsdp, tensor=tensor))
    return meshes


def _chunked(config: RunConfig, stage: Stage) -> tuple[int, Callable[[int], RunConfig]]:
    if stage == "sft":
        return config.sft.global_batch, lambda size: dataclasses.replace(
            config, sft=dataclasses.replace(config.sft, encode_chunk=size)
        )
    if stage == "rl":
        return config.rl.global_queries, lambda size: dataclasses.replace(
            config, rl=dataclasses.replace(config.rl, micro_queries=size)
        )
    raise UserError(f"--largest: {stage} has no chunk to find; it is for sft and rl")


def _tried(config: RunConfig, stage: Stage, slices: Slice) -> Plan | None:
    try:
        return make_plan(config, stage, slices)
    except UserError as error:
        if "GiB a chip" in str(error):
            return None
        raise


def _named(mesh: MeshConfig) -> str:
    return (
        " × ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(mesh).items() if size != 1)
        or "one chip"
    )
