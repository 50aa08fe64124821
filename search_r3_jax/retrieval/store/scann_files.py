"""ScaNN's files in an index version: one folder, or one for each part of the rows."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from search_r3_jax.retrieval.index.parts import PartsIndex, part_ranges
from search_r3_jax.retrieval.index.protocol import LocalIndex
from search_r3_jax.retrieval.index.scann import ScannIndex, ScannSettings

SCANN = "scann"


def write_scann(
    path: epath.Path,
    vectors: np.ndarray,
    ids: Sequence[str],
    *,
    parts: int,
    settings: ScannSettings | None,
    threads: int,
) -> ScannSettings:
    """Build ScaNN over vectors [N,E], part after part, into the local folder of a version.

    Returns the settings: those given, or those that suit the size of a part. Raises OSError when the disk
    refuses.
    """
    ranges = part_ranges(len(vectors), parts)
    settings = settings or ScannSettings.for_corpus(ranges[0][1], vectors.shape[1])
    for part, (start, stop) in enumerate(ranges):
        folder = _part_folder(path, part, parts)
        folder.mkdir()
        built = ScannIndex.build(vectors[start:stop], ids[start:stop], 0, settings, threads)
        built.save(os.fspath(folder))
    return settings


def load_scann(
    path: epath.Path,
    vectors: np.ndarray,
    ids: Sequence[str],
    version: int,
    *,
    parts: int,
    share: tuple[int, int] = (0, 1),
    digest: str = "",
    threads: int = 0,
) -> LocalIndex:
    """Load what `write_scann` wrote; raises as `ScannIndex.load`.

    Of several parts, process p of P loads every P-th from p on; `share` is (p, P). `digest` is that of the
    manifest.
    """
    if parts == 1:
        return ScannIndex.load(os.fspath(path / SCANN), vectors, ids, version, threads)
    process, processes = share
    loaded = list[tuple[int, ScannIndex]]()
    for part, (start, stop) in enumerate(part_ranges(len(vectors), parts)):
        if part % processes == process:
            folder = os.fspath(_part_folder(path, part, parts))
            index = ScannIndex.load(folder, vectors[start:stop], ids[start:stop], version, threads)
            loaded.append((start, index))
    return PartsIndex(loaded, vectors, ids, version, digest=digest)


def _part_folder(path: epath.Path, part: int, parts: int) -> epath.Path:
    return path / (SCANN if parts == 1 else f"{SCANN}-{part:05d}-of-{parts:05d}")
