"""Every mesh over so many devices."""

import itertools
import math

from search_r3_jax.mesh import MESH_AXES


def every_mesh(devices: int, *, most_tensor: int) -> list[dict[str, int]]:
    """All sizes that multiply to `devices`, heads over no more than `most_tensor` of them."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    meshes = list[dict[str, int]]()
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        named: dict[str, int] = dict(zip(MESH_AXES, sizes, strict=True))
        if math.prod(sizes) == devices and named["tensor"] <= most_tensor:
            meshes.append(named)
    return meshes
