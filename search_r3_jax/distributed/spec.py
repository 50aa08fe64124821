"""Membership of a cluster from flags, environment and hardware. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from search_r3_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "SEARCH_R3_COORDINATOR", "SEARCH_R3_PROCESSES", "SEARCH_R3_PROCESS"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that train together.

    Attributes:
        coordinator: `host:port` where process 0 listens. Empty: that of SEARCH_R3_COORDINATOR, or detected
            (SLURM, TPU metadata), or not needed.
        processes: Number of processes. 0: that of SEARCH_R3_PROCESSES, or detected.
        process: Index of this process, from 0. -1: that of SEARCH_R3_PROCESS, or detected.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1


def explicit_cluster(cluster: Cluster, environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that flags name, completed by environment variables; None if neither names one.

    Raises UserError for an incomplete description.
    """
    coordinator = cluster.coordinator or environment.get(COORDINATOR, "")
    processes = str(cluster.processes or environment.get(PROCESSES, ""))
    process = str(cluster.process if cluster.process >= 0 else environment.get(PROCESS, ""))
    if not (coordinator or processes or process):
        return None
    if not (
        ":" in coordinator and processes.isdecimal() and process.isdecimal() and int(process) < int(processes)
    ):
        raise UserError(
            f"cluster: coordinator {coordinator!r}, processes {processes!r}, process {process!r}: give all "
            "three, by flags or as "
            f"{COORDINATOR} (host:port), {PROCESSES} and {PROCESS} (0 to {PROCESSES} − 1)"
        )
    return Cluster(coordinator=coordinator, processes=int(processes), process=int(process))


def is_detectable(
    environment: Mapping[str, str], accelerators: tuple[str, ...] = ("/dev/accel0", "/dev/vfio/0")
) -> bool:
    """Whether JAX can detect the cluster: several tasks of SLURM, or a TPU host."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return True
    on_tpu = any(Path(device).exists() for device in accelerators)
    return on_tpu and environment.get("JAX_PLATFORMS", "tpu") in ("", "tpu")
