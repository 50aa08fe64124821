"""Published peak numbers of each TPU generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU generation.

    Attributes:
        name: as in the name of a topology, `v5e`.
        kinds: JAX's device kinds; one device is one chip.
        flops: dense bfloat16 peak, FLOP/s.
        hbm: bytes of memory that the compiler makes available to a program, a little less than is built in.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that a chip can send to its neighbours over all links together.
        dcn_bandwidth: bytes/s of a chip's share of the data-centre network, which joins slices.
        cores: cores per chip that the names of its slices count, as in v5p-16.
        source: where the peaks are published.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    cores: int
    source: str


_GIB, _GIGABIT = 2.0**30, 1e9 / 8

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            kinds=("TPU v4",),
            flops=275e12,
            hbm=30.75 * _GIB,
            hbm_bandwidth=1.2e12,
            ici_bandwidth=2400 * _GIGABIT,
            # Published for later generations only; taken from the next one.
            dcn_bandwidth=25 * _GIGABIT,
            cores=2,
            source="https://cloud.google.com/tpu/docs/v4",
        ),
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            flops=197e12,
            hbm=15.75 * _GIB,
            hbm_bandwidth=819e9,
            ici_bandwidth=1600 * _GIGABIT,
            # 6.4 Tbit/s a pod of 256 chips.
            dcn_bandwidth=25 * _GIGABIT,
            cores=1,
            source="https://cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            name="v5p",
            kinds=("TPU v5", "TPU v5p"),
            flops=459e12,
            hbm=95.74 * _GIB,
            hbm_bandwidth=2765e9,
            ici_bandwidth=4800 * _GIGABIT,
            dcn_bandwidth=50 * _GIGABIT,
            cores=2,
            source="https://cloud.google.com/tpu/docs/v5p",
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            flops=918e12,
            hbm=31.25 * _GIB,
            hbm_bandwidth=1640e9,
            ici_bandwidth=3200 * _GIGABIT,
            # 25.6 Tbit/s a pod of 256 chips.
            dcn_bandwidth=100 * _GIGABIT,
            cores=1,
            source="https://cloud.google.com/tpu/docs/v6e",
        ),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip for a device kind of JAX; None for anything but these TPU generations."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Published peak of all these devices together, FLOP/s; None where none is published, as of a CPU.

    A peak that is measured is as high as the machine is quiet at that moment.
    """
    chip = chip_of(devices[0].device_kind)
    return None if chip is None else chip.flops * len(devices)
