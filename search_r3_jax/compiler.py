"""What XLA is told when it compiles for a TPU: one option a line, each with its reason; a CPU or GPU is told
nothing."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from search_r3_jax.chips import chip_of

_ALL = {
    # A matrix that is gathered would be taken apart into as many steps of a loop as there are devices, and
    # gathered anew for every text that it is multiplied by: over 16 chips the loops move five times the
    # bytes. The smallest product that may become one, in MiB.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_OF_CHIP: dict[str, dict[str, int | bool | str]] = {
    "v4": {},
    "v5e": {},
    "v5p": {},
    # The scratch memory of a v6e is larger than the default of all generations; attention with large tiles
    # wants it, in KiB.
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": 98304},
}


def compiler_options(mesh: Mesh | None) -> dict[str, int | bool | str]:
    """Options for `jax.jit(compiler_options=…)` of a program on this mesh; None is the first device there
    is."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    return {} if chip is None else _ALL | _OF_CHIP[chip.name]


def keep_programs(folder: Path) -> None:
    """From here on compiled programs are kept in a folder, where the next start of a run, after a preemption,
    finds them.

    JAX_COMPILATION_CACHE_DIR, where it is set, names another. Of several processes the first writes.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))
