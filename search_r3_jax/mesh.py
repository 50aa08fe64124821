"""Meshes and shardings: tables from parameters to logical axes and from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from search_r3_jax.config import MeshConfig, ModelConfig
from search_r3_jax.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor", "sequence")
# A batch is sharded over all three: FSDP is data parallelism with sharded parameters.
BATCH_AXES = ("slice", "data", "fsdp")
# XLA propagates shardings from the constraints of `constrain`.
_AUTO = (AxisType.Auto,) * len(MESH_AXES)
TOKENS = (BATCH_AXES, "sequence")
"""Sharding of the dimensions B and T of states [B,T,…] between layers."""

# Logical axis → mesh axis; None is replicated.
LOGICAL_AXES: dict[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "rank": None,
    # Norms, biases over D and single rows are too small to be worth a gather.
    "norm": None,
}

# A linear layer's input and output axes.
_LINEARS = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "feed_forward"),
    "up": ("embed", "feed_forward"),
    "down": ("feed_forward", "embed"),
}

# Parameter path → its logical axes.
PARAMETER_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embedding",): ("vocab", "embed"),
    ("head",): ("embed", "vocab"),
    ("embed_row",): ("norm",),
    ("head_row",): ("norm",),
    ("final_norm", "scale"): ("norm",),
    **{
        ("layers", norm, "scale"): ("layers", "norm")
        for norm in ("attention_norm", "feed_forward_norm", "q_norm", "k_norm")
    },
}
for _name, (_inputs, _outputs) in _LINEARS.items():
    PARAMETER_AXES |= {
        ("layers", _name, "kernel"): ("layers", _inputs, _outputs),
        ("layers", _name, "bias"): ("layers", _outputs),
        ("layers", _name, "lora_a"): ("layers", _inputs, "rank"),
        ("layers", _name, "lora_b"): ("layers", "rank", _outputs),
    }


class HasConfig(Protocol):
    """A decoder of arrays or of shapes."""

    config: ModelConfig


def make_mesh(
    *,
    slice: int = 1,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over `devices`, by default all; a size of −1 takes the devices that the others leave.

    Raises UserError when the sizes do not multiply to the number of devices, or `slice` is not the number of
    TPU slices.
    """
    chosen = jax.devices() if devices is None else list(devices)
    sizes: dict[str, int] = dict(zip(MESH_AXES, (slice, data, fsdp, tensor, sequence), strict=True))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or fixed < 1:
        raise UserError(
            f"mesh: {sizes}: sizes are positive, and one may be -1 to take the devices that are left"
        )
    if len(chosen) % fixed or (not open_axes and fixed != len(chosen)):
        divisors = ", ".join(str(n) for n in _divisors(len(chosen)))
        raise UserError(
            f"mesh: {sizes}: the sizes must multiply to {len(chosen)} devices; sizes that work divide that: "
            f"{divisors}"
        )
    if open_axes:
        sizes[open_axes[0]] = len(chosen) // fixed
    slices = _by_slice(chosen)
    if len(slices) > 1 and sizes["slice"] != len(slices):
        raise UserError(
            f"mesh.slice: {sizes['slice']}: these devices are of {len(slices)} slices; give {len(slices)}"
        )
    if len(slices) == 1:
        return _mesh(tuple(sizes.values()), chosen)
    # Only the outermost axis crosses slices, so each slice gets its own inner mesh.
    within = [_mesh((1, *tuple(sizes.values())[1:]), each).devices for each in slices]
    return Mesh(np.concatenate(within), MESH_AXES, axis_types=_AUTO)


def _mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh(shape, MESH_AXES, axis_types=_AUTO, devices=devices)


def _by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices grouped by TPU slice; other devices form one group."""
    if devices[0].platform != "tpu":
        return [list(devices)]
    # Devices of a topology description have no slice index when there is one slice.
    numbers = [getattr(device, "slice_index", 0) for device in devices]
    return [
        [device for device, number in zip(devices, numbers, strict=True) if number == each]
        for each in sorted(set(numbers))
    ]


def mesh_from_config(config: MeshConfig) -> Mesh | None:
    """The mesh of a run over all devices; None for a single device.

    Raises UserError when the sizes do not fit the devices.
    """
    mesh = make_mesh(**dataclasses.asdict(config))
    return mesh if mesh.size > 1 else None


def param_shardings(decoder: HasConfig, mesh: Mesh) -> dict[str, Any]:
    """The `NamedSharding` of each parameter, nested like `nnx.to_pure_dict(nnx.state(decoder, nnx.Param))`.

    Raises UserError when a size of the model is not a multiple of its mesh axis.
    """
    check_divisible(decoder.config, mesh)
    return map_params(
        lambda _, spec: NamedSharding(mesh, spec), nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    )


def map_params(function: Callable[[Any, PartitionSpec], Any], params: Any) -> Any:
    """Apply `function` to every parameter and its `PartitionSpec`, keeping the tree structure."""

    def of(path: tuple[Any, ...], x: Any) -> Any:
        return function(
            x, param_spec(tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)))
        )

    return jax.tree_util.tree_map_with_path(of, params)


def param_spec(path: tuple[str, ...]) -> PartitionSpec:
    """The `PartitionSpec` of the parameter at a path of `PARAMETER_AXES`."""
    return PartitionSpec(*(LOGICAL_AXES[axis] for axis in PARAMETER_AXES[path]))


def reshape_mesh(mesh: Mesh, *, fsdp: int, tensor: int) -> Mesh:
    """The same devices in the same order with other sizes of `fsdp` and `tensor`; `data` takes the rest."""
    devices = mesh.devices.reshape(mesh.shape["slice"], -1, fsdp, tensor, mesh.shape["sequence"])
    return Mesh(devices, MESH_AXES, axis_types=_AUTO)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Apply a sharding constraint on the active mesh.

    None replicates a dimension; so does a length that its axes do not divide, such as the single row of a
    prompt prefix. No-op without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitting = (
        over if length % axis_size(mesh, over) == 0 else None
        for length, over in zip(x.shape, axes, strict=False)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def layer_spec(linear: str, part: str) -> PartitionSpec:
    """The `PartitionSpec` of a part of one layer's linear, without the layer axis."""
    return PartitionSpec(*param_spec(("layers", linear, part))[1:])


def reshard(x: jax.Array, spec: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """Change a parameter's sharding from `spec` to `used` on the active mesh, and its gradient's back.

    No-op without a mesh.
    """
    return constrain(constrain(x, *spec), *used)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Activate a mesh for `constrain` while a function is traced; no-op for None."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def axis_size(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of shards of a dimension that is sharded over these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def placed(x: Any, sharding: Sharding) -> jax.Array:
    """An array on the devices of a sharding; a local one has the same values in every process."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    # `device_put` would leave an array whose parts of this process cannot be read.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def check_divisible(config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError naming each mesh axis that does not divide the model, and the sizes that would."""
    # Heads, not their dimensions: a head is never split.
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "feed_forward": config.feed_forward,
    }
    problems = []
    for mesh_axis in MESH_AXES:
        lengths = {name: length for name, length in sizes.items() if LOGICAL_AXES[name] == mesh_axis}
        size = mesh.shape[mesh_axis]
        uneven = [f"{name} {length}" for name, length in lengths.items() if length % size]
        if uneven:
            works = ", ".join(str(n) for n in _divisors(math.gcd(*lengths.values())))
            problems.append(
                f"{mesh_axis} = {size} does not divide {' and '.join(uneven)} (sizes that work: {works})"
            )
    if problems:
        raise UserError(f"mesh: {'; '.join(problems)}")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
