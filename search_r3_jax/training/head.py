"""The head of a training step: the matrix that makes logits of hidden states, where it lies on a mesh, and
how much of it at a time."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, PartitionSpec

from search_r3_jax.mesh import BATCH_AXES, axis_size, constrain, reshard
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.objectives.language import Head

# What one device takes of the logits at a time.
STATES, COLUMNS = 256, 16384
# On a mesh every device has a part of the vocabulary and all of D, and reads the states of its neighbours:
# they are far smaller than the matrix, which moves from how it is stored by an exchange of parts and never
# stands whole anywhere.
_VOCAB_AXES = ("tensor", "fsdp")
STATE_AXES = tuple(axis for axis in (*BATCH_AXES, "sequence") if axis not in _VOCAB_AXES)


def head_of(decoder: Decoder, *, adapters: bool = True) -> Head:
    """What makes logits of a decoder's hidden states, as `Decoder.logits` does, laid out for the losses."""
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
    """Hidden states [M,D] where the head reads them."""
    return constrain(hidden_md, STATE_AXES)


def head_chunks(vocab_size: int, mesh: Mesh | None) -> tuple[int, int]:
    """How many states, and how many columns of the vocabulary, the losses on the head take at a time; each
    device its part of them."""
    if mesh is None:
        return STATES, COLUMNS
    return STATES * axis_size(mesh, (*STATE_AXES, *_VOCAB_AXES)), vocab_size
