"""Every mesh over so many devices."""

import itertools
import math

from search_r3_jax.mesh import MESH_AXES


def every_mesh(devices: int, *, most_tensor: int) -> list[dict[str, int]]:
    """All sizes that multiply to `devices`, heads over no more than `most_tensor` of them."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    meshes = [dict(zip(MESH_AXES, sizes, strict=True)) for sizes in itertools.product(divisors, repeat=len(MESH_AXES))]
    return [sizes for sizes in meshes if math.prod(sizes.values()) == devices and sizes["tensor"] <= most_tensor]
