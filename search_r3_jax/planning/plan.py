"""Plans: memory, work, exchanges and least time of a stage on a TPU slice, from its compiled program."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from search_r3_jax.chips import CHIPS, Chip
from search_r3_jax.config import MeshConfig, RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.mesh import make_mesh
from search_r3_jax.planning.hlo import Collective, read_program
from search_r3_jax.planning.stages import LoweredStage, Stage, lower_stage

# Share of a chip's memory that must stay free.
SPARE = 0.05
logger = logging.getLogger(__name__)
_TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)")
_SLICE = re.compile(r"(v4|v5e|v5p|v6e)-(\d+)")
# Shapes of available slices, by number of chips.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}


class Slice(NamedTuple):
    """Chips to plan for: `topology` as in `v5p:2x2x2`, `devices` without hardware."""

    chip: Chip
    topology: str
    slices: int
    devices: list[Any]


def open_slice(topology: str, slices: int = 1) -> Slice:
    """One or several slices, named by shape (`v5p:2x2x2`) or as Google Cloud does (`v5p-16`: 8 chips).

    Raises UserError for an unknown name, and if the TPU compiler is not installed.
    """
    shaped = slice_shape(topology)
    generation = shaped.split(":")[0]
    # Plans are for other machines: the compiler must not query this one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No chip is in use, so several plans may be made at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # Both cores of a v4 chip form one device, as JAX shows them on a real machine.
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if shaped.endswith(":1x1"):
        # A host has four chips by default; this slice has one.
        settings["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(shaped, platform="tpu", num_slices=slices, **settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "libtpu" in reason or "Unable to initialize" in reason or "not found" in reason.lower():
            raise UserError(
                f"plan: the TPU compiler is not installed ({reason}); pip install 'search_r3_jax[plan]', on "
                "Linux"
            ) from None
        raise UserError(f"--topology: {topology}: the TPU compiler knows no such slice ({reason})") from None
    return Slice(CHIPS[generation], shaped, slices, list(description.devices))


def slice_shape(topology: str) -> str:
    """A slice's name as a shape: `v5p-16` is `v5p:2x2x2`. Raises UserError for an unknown name."""
    if _TOPOLOGY.fullmatch(topology):
        return topology
    named = _SLICE.fullmatch(topology)
    if named is None:
        raise UserError(
            f"--topology: {topology}: give a shape, such as v5e:4x4, or a slice's name, such as v5p-16; of "
            f"{', '.join(CHIPS)}"
        )
    generation, count = named.group(1), int(named.group(2)) // CHIPS[named.group(1)].cores
    shapes = _FLAT if generation in ("v5e", "v6e") else _DEEP
    if count not in shapes:
        sizes = ", ".join(f"{generation}-{chips * CHIPS[generation].cores}" for chips in shapes)
        raise UserError(
            f"--topology: {topology}: no such slice; there are {sizes}; or give a shape, such as "
            f"{generation}:{shapes[16]}"
        )
    return f"{generation}:{shapes[count]}"


# What makes a stage smaller, where it does not fit.
_REMEDIES: dict[Stage, str] = {
    "sft": "lower sft.encode_chunk (--largest finds the largest that fits), take more chips, or adapters "
    "(--lora.rank 16)",
    "rl": "lower rl.micro_queries (--largest finds the largest that fits), take more chips, or adapters "
    "(--lora.rank 16)",
    "decode": "lower rl.global_queries or rl.group_size, or take more chips",
    "encode": "shard the weights over more chips (--mesh.fsdp), or take larger ones",
    "search": "store vectors in bfloat16 (--index.vector-dtype bfloat16), or take more chips",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Needs and limits of a stage: bytes, FLOPs and seconds of one run, per chip unless stated otherwise.

    Attributes:
        settings: settings of the experiment that determine the stage's size.
        mesh: the size of each axis.
        chips: number of chips.
        fits: at least 5 % of the memory stay free.
        hbm: bytes by kind: arrays kept between runs, the batch, results, temporaries, the program.
        hbm_used, hbm_limit, hbm_spare: their sum, the chip's memory, and the share that stays free.
        counted_bytes: parameters and optimiser state, computed from their shapes.
        shardings: shape of each parameter, and the mesh axes of each dimension.
        arguments_bytes: arguments of the program without the batch, in the compiler's layout.
        tokens: of all chips together.
        model_flops: FLOPs of the mathematics, without recomputation.
        executed_flops: FLOPs of the program; `recomputed` is the ratio of the two.
        attention_flops: part of the attention kernels in it, if no tile is skipped.
        collective_bytes: bytes sent, by mesh axes.
        collectives: the largest exchanges.
        fsdp_bound_bytes: least bytes of fully sharded parameters: gathered in bfloat16 for the forward and
            the backward pass, once more for a reference model, and gradients scattered. `collective_ratio`
            is the sent bytes over this bound, None on one chip.
        seconds: least time of compute, hbm and ici (dcn with several slices) at the published peaks; `binds`
            names the longest.
        tokens_per_second: upper bound, all chips together.
        mfu_bound: upper bound of the share of the chips' peak.
        compile_seconds: compile time on the machine that made the plan.
    """

    stage: str
    model: str
    topology: str
    slices: int
    settings: dict[str, Any]
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm: dict[str, float]
    hbm_used: float
    hbm_limit: float
    hbm_spare: float
    counted_bytes: float
    shardings: dict[str, Any]
    arguments_bytes: float
    tokens: int
    model_flops: float
    executed_flops: float
    attention_flops: float
    recomputed: float
    collective_bytes: dict[str, float]
    collectives: list[dict[str, Any]]
    fsdp_bound_bytes: float
    collective_ratio: float | None
    seconds: dict[str, float]
    binds: str
    tokens_per_second: float
    mfu_bound: float
    peaks: dict[str, Any]
    compile_seconds: float


def make_plan(
    config: RunConfig,
    stage: Stage,
    slices: Slice,
    *,
    mesh_config: MeshConfig | None = None,
    documents: int = 0,
) -> Plan:
    """The plan of a stage on a slice, with `documents` of a `device` index on its chips.

    Raises UserError when the mesh does not fit, or when the compiler runs out of memory.
    """
    mesh = make_mesh(**dataclasses.asdict(mesh_config or config.mesh), devices=slices.devices)
    logger.info(f"{stage} of {config.model} on {slices.topology}: tracing the program of {mesh.size} chips …")
    lowered = lower_stage(config, stage, mesh, documents=documents)
    started = time.perf_counter()
    logger.info("compiling it for these chips, which takes a minute or more …")
    try:
        compiled = lowered.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([MG])\) exceeds available HBM|Used ([\d.]+)([MG]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        amount = (
            f"{needed.group(1) or needed.group(3)} {needed.group(2) or needed.group(4)}iB"
            if needed
            else "more"
        )
        raise UserError(
            f"{stage} on {slices.topology}: needs {amount} of {slices.chip.hbm / 2**30:.2f} GiB a chip; "
            f"{_REMEDIES[stage]}"
        ) from None
    seconds = time.perf_counter() - started
    logger.info(f"compiled in {seconds:.0f} s")
    settings = stage_settings(config, stage, documents=documents)
    return _plan(config, stage, slices, mesh, lowered, compiled, settings, seconds)


def _plan(
    config: RunConfig,
    stage: Stage,
    slices: Slice,
    mesh: Mesh,
    lowered: LoweredStage,
    compiled: jax.stages.Compiled,
    settings: dict[str, Any],
    seconds: float,
) -> Plan:
    chip, chips = slices.chip, mesh.size
    program = read_program(compiled, dict(mesh.shape), open_rounds=lowered.open_rounds)
    hbm = _memory(lowered, compiled)
    executed = program.flops + program.attention_flops
    model_flops = lowered.model_flops / chips
    sent = defaultdict[str, float](float)
    for each in program.collectives:
        sent[" ".join(each.axes)] += each.bytes
    over_dcn = sum(amount for axes, amount in sent.items() if "slice" in axes.split())
    bound = _fsdp_bound(lowered, mesh)
    times = {
        "compute": executed / chip.flops,
        "hbm": (program.product_bytes + _optimizer_traffic(lowered)) / chip.hbm_bandwidth,
        "ici": (sum(sent.values()) - over_dcn) / chip.ici_bandwidth,
    } | ({"dcn": over_dcn / chip.dcn_bandwidth} if slices.slices > 1 else {})
    least = max(times.values())
    used = sum(hbm.values())
    return Plan(
        stage=stage,
        model=config.model,
        topology=slices.topology,
        slices=slices.slices,
        settings=settings,
        chips=chips,
        mesh=dict(mesh.shape),
        fits=used <= (1 - SPARE) * chip.hbm,
        hbm=hbm,
        hbm_used=used,
        hbm_limit=chip.hbm,
        hbm_spare=1 - used / chip.hbm,
        counted_bytes=sum(
            _bytes_on_chip(lowered.kept[kind]) for kind in ("parameters", "optimizer") if kind in lowered.kept
        ),
        shardings=_shardings(lowered.kept.get("parameters") or lowered.beside["parameters"]),
        arguments_bytes=_argument_bytes(lowered, compiled),
        tokens=lowered.tokens,
        model_flops=model_flops,
        executed_flops=executed,
        attention_flops=program.attention_flops,
        recomputed=executed / model_flops,
        collective_bytes=dict(sent),
        collectives=_largest(program.collectives),
        fsdp_bound_bytes=bound,
        collective_ratio=sum(sent.values()) / bound if bound else None,
        seconds=times,
        binds=max(times, key=lambda name: times[name]),
        tokens_per_second=lowered.tokens / least,
        mfu_bound=model_flops / chip.flops / least,
        peaks={
            "flops": chip.flops,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "ici_bandwidth": chip.ici_bandwidth,
            "dcn_bandwidth": chip.dcn_bandwidth,
            "source": chip.source,
        },
        compile_seconds=seconds,
    )


def stage_settings(config: RunConfig, stage: Stage, *, documents: int = 0) -> dict[str, Any]:
    """The settings that determine the size of a stage; two configs that agree in them have the same plan."""
    settings: dict[str, Any] = {
        "text": dataclasses.asdict(config.text),
        "lora_rank": config.lora.rank,
        "remat": config.remat,
    }
    settings |= {"attention": config.attention, "compute_dtype": config.compute_dtype}
    if stage == "sft":
        names = ("global_batch", "encode_chunk", "negatives", "reasoned_share", "kl_weight")
        settings |= {name: getattr(config.sft, name) for name in names}
    if documents:
        settings |= {"documents": documents, "vector_dtype": config.index.vector_dtype}
    if stage == "search":
        names = ("global_queries", "group_size")
        settings |= {name: getattr(config.rl, name) for name in names}
        settings |= {"candidates": config.index.candidates, "recall_gate": config.index.recall_gate}
    if stage in ("rl", "decode"):
        names = ("global_queries", "group_size")
        names += ("micro_queries", "beta", "inner_epochs") if stage == "rl" else ()
        settings |= {name: getattr(config.rl, name) for name in names}
        settings["max_think_tokens"] = config.rl.sampler.max_think_tokens
        if stage == "decode" and config.rl.sampler.slots:
            settings["slots"] = config.rl.sampler.slots
    return settings


def _memory(lowered: LoweredStage, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes on a chip by kind, in the compiler's layout; results that reuse arguments count once."""
    memory = compiled.memory_analysis()
    assert memory is not None
    kept = {kind: _bytes_on_chip(tree) for kind, tree in lowered.kept.items()}
    return (
        kept
        | {kind: _bytes_on_chip(tree) for kind, tree in lowered.beside.items()}
        | {
            "batch": max(memory.argument_size_in_bytes - sum(kept.values()), 0.0),
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        }
    )


def _argument_bytes(lowered: LoweredStage, compiled: jax.stages.Compiled) -> float:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes - _bytes_on_chip(lowered.batch)


def _shardings(params: Any) -> dict[str, Any]:
    """Shape and mesh axes of each parameter, by path."""
    shardings = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        over = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
        shardings[name] = {"shape": list(x.shape), "over": over}
    return dict(sorted(shardings.items()))


def _bytes_on_chip(tree: Any) -> float:
    return float(
        sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )


def _optimizer_traffic(lowered: LoweredStage) -> float:
    """Trained parameters and moments are read and written once per step."""
    return 2 * _bytes_on_chip(lowered.kept["optimizer"]) * 1.5 if "optimizer" in lowered.kept else 0.0


def _fsdp_bound(lowered: LoweredStage, mesh: Mesh) -> float:
    """Least bytes that a chip sends to gather weights and to sum gradients.

    Weights are gathered within a tensor-parallel group's shards; gradients are also summed across copies.
    """
    whole, reference, trained = lowered.gathered
    shards, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    copies = mesh.size // (shards * tensor)
    gathered, scattered = (2 * whole + reference) if trained else whole, trained
    within = 2.0 * (gathered + scattered) / tensor * (shards - 1) / shards
    return within + 2.0 * scattered / (tensor * shards) * 2 * (copies - 1) / copies


def _largest(collectives: Sequence[Collective], count: int = 8) -> list[dict[str, Any]]:
    merged = defaultdict[tuple[str, str, str], list[float]](lambda: [0, 0.0])
    for each in collectives:
        entry = merged[each.kind, " ".join(each.axes), each.shape[:80]]
        entry[0] += each.runs
        entry[1] += each.bytes
    ordered = sorted(merged.items(), key=lambda item: -item[1][1])[:count]
    return [
        {"kind": kind, "axes": axes, "shape": shape, "runs": runs, "bytes": size}
        for (kind, axes, shape), (runs, size) in ordered
    ]
