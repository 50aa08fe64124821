"""XLA options for TPU programs, one option a line, each with its reason; none for CPU and GPU."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from search_r3_jax.chips import chip_of

_ALL = {
    # Below this size, in MiB, XLA does not turn the product with a gathered matrix into a loop over the
    # devices. The loop gathers the matrix again for every text: five times the bytes over 16 chips.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_OF_CHIP: dict[str, dict[str, int | bool | str]] = {
    "v4": {},
    "v5e": {},
    "v5p": {},
    # In KiB. A v6e has more scratch memory than the common default; attention with large tiles needs it.
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": 98304},
}


def compiler_options(mesh: Mesh | None) -> dict[str, int | bool | str]:
    """Options for `jax.jit(compiler_options=…)` of a program on a mesh; None is the first device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    return {} if chip is None else _ALL | _OF_CHIP[chip.name]
