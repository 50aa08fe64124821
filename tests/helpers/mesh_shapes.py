"""Meshes of eight devices: every one, and few in which all axes meet."""

import itertools
import math

from search_r3_jax.mesh import MESH_AXES

# Every two axes are in one of these.
_TOGETHER = [
    ("slice", "data", "fsdp"),
    ("slice", "tensor", "sequence"),
    ("data", "tensor", "sequence"),
    ("fsdp", "tensor", "sequence"),
]


def every_mesh(devices: int, *, most_tensor: int) -> list[dict[str, int]]:
    """All sizes that multiply to `devices`, heads over no more than `most_tensor` of them."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    meshes = list[dict[str, int]]()
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        named: dict[str, int] = dict(zip(MESH_AXES, sizes, strict=True))
        if math.prod(sizes) == devices and named["tensor"] <= most_tensor:
            meshes.append(named)
    return meshes


def covering_meshes() -> list[dict[str, int]]:
    """Of `every_mesh(8, most_tensor=2)`: every two axes together."""
    return [{"fsdp": 1} | dict.fromkeys(axes, 2) for axes in _TOGETHER]
