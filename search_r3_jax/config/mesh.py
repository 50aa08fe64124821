"""The device mesh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh. One axis may be -1: all devices that the others leave.

    Attributes:
        slice: TPU slices joined by the data-centre network. Shards the batch; parameters are replicated.
        data: Data parallelism. Shards the batch; parameters are replicated.
        fsdp: Fully sharded data parallelism. Shards the batch, and the model dimension (D) of the
            parameters. -1: all devices that the other axes leave.
        tensor: Tensor parallelism. Shards heads, the feed-forward dimension and the vocabulary.
        sequence: Sequence parallelism. Shards the tokens of rows too long for one device.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
