"""The language-model head in a training step: its sharding, and the chunk sizes of its losses."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, PartitionSpec

from search_r3_jax.mesh import BATCH_AXES, axis_size, constrain, reshard
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.objectives.language import Head

# Chunk of the logits on one device.
STATES, COLUMNS = 256, 16384
# On a mesh each device holds a part of the vocabulary with all of D and gathers the hidden states of its
# neighbours, which are far smaller than the matrix. The matrix is resharded by an all-to-all, never gathered.
_VOCAB_AXES = ("tensor", "fsdp")
STATE_AXES = tuple(axis for axis in (*BATCH_AXES, "sequence") if axis not in _VOCAB_AXES)


def head_of(decoder: Decoder, *, adapters: bool = True) -> Head:
    """The head of a decoder, with the same logits as `Decoder.logits`, sharded for the losses."""
    if decoder.head is None:
        weight = reshard(
            decoder.embedding[...], PartitionSpec("tensor", "fsdp"), PartitionSpec(_VOCAB_AXES, None)
        )
        vocab_axis, row = 0, decoder.embed_row
    else:
        weight = reshard(decoder.head[...], PartitionSpec("fsdp", "tensor"), PartitionSpec(None, _VOCAB_AXES))
        vocab_axis, row = 1, decoder.head_row
    if not adapters or row is None or decoder.embed_id is None:
        return Head(weight=weight, vocab_axis=vocab_axis)
    return Head(weight=weight, vocab_axis=vocab_axis, row_d=row[...], row_id=decoder.embed_id)


def states_for_head(hidden_md: jax.Array) -> jax.Array:
    """Hidden states [M,D] with the sharding that the head reads."""
    return constrain(hidden_md, STATE_AXES)


def head_chunks(vocab_size: int, mesh: Mesh | None) -> tuple[int, int]:
    """Chunk sizes of the head's losses: hidden states, and columns of the vocabulary.

    On a mesh both count all devices together; each device takes its share.
    """
    if mesh is None:
        return STATES, COLUMNS
    return STATES * axis_size(mesh, (*STATE_AXES, *_VOCAB_AXES)), vocab_size
