"""What an index starts from, and what it is of: shared by all sources of an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.retrieval.environment.environment import EncodeDocuments

EncodeWith = Callable[[nnx.State, np.ndarray], np.ndarray]
"""Embeds rows [n] of a corpus, [n,E], with trainable parameters in the dtype of a snapshot."""


@dataclass(frozen=True, kw_only=True)
class IndexStatistics:
    """Which index versions a run has used.

    Attributes:
        version: the one in use.
        swaps: (step, version) of every change of version.
        versions: each version's step, recall@10 against exact search, seconds to encode and to build.
    """

    version: int = 0
    swaps: tuple[tuple[int, int], ...] = ()
    versions: tuple[Mapping[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The statistics as JSON."""
        return {
            "index_version": self.version,
            "swaps": [list(swap) for swap in self.swaps],
            "index_versions": [dict(version) for version in self.versions],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> IndexStatistics:
        """The inverse of `to_json`."""
        return cls(
            version=values["index_version"],
            swaps=tuple((int(at), int(version)) for at, version in values["swaps"]),
            versions=tuple(values["index_versions"]),
        )


@dataclass(frozen=True, kw_only=True)
class IndexStart:
    """Where a live index starts: at the start of a run, or at the checkpoint that it resumes from.

    Attributes:
        step: the checkpoint's step.
        statistics: those of the checkpoint.
        arrays: what `checkpoint_arrays` gave at the checkpoint.
        allow_other_version: take another version where the one in use is gone.
    """

    step: int = 0
    statistics: IndexStatistics = field(default_factory=IndexStatistics)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    allow_other_version: bool = False


@dataclass(frozen=True, kw_only=True)
class IndexedCorpus:
    """What a run indexes, and how.

    Attributes:
        encode: embeds rows of the corpus with the current parameters.
        encode_with: embeds them with those of a snapshot.
        trainable: the trainable parameters, for their shapes and shardings.
        embed_id: id of the embed token.
        dim: width of the vectors.
    """

    config: RunConfig
    collection: Collection
    encode: EncodeDocuments
    encode_with: EncodeWith
    trainable: nnx.State
    embed_id: int
    dim: int
