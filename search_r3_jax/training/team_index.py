"""An index that several processes hold: each its parts or the rows of its devices, and a search asks all."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.device import DeviceIndex, StoredVectors
from search_r3_jax.retrieval.index.exact import next_power_of_two
from search_r3_jax.retrieval.index.parts import PartsIndex, merge_top_k
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.store.versions import IndexVersionError, list_versions, open_version

logger = logging.getLogger(__name__)


class IndexShare:
    """What this process holds of the index in use; every process of a run has one."""

    def __init__(self, team: Team, roots: Sequence[epath.Path]):
        """`roots` are the folders that a version may be in."""
        self._roots, self._own = roots, list[Index]()
        self._open = team.together("open index", self._open_own)
        self.search = team.together("search index", self._search_own)
        self.take = team.together("take of index", self._take_own)

    def shared(self, index: Index) -> Index:
        """What process 0, which alone calls it, searches in place of `index`: what all processes hold.

        An index that one process holds stays. Raises UserError where another process cannot open its share.
        """
        if jax.process_count() == 1 or not isinstance(index, PartsIndex | StoredVectors):
            return index
        self._own = [index]
        self._open(np.array([index.version]), np.frombuffer(index.digest.encode(), np.uint8))
        return TeamIndex(index, self)

    def _open_own(self, version: np.ndarray, digest: np.ndarray) -> None:
        problem = ""
        if jax.process_index() > 0:
            self._own, problem = self._opened(int(version[0]), digest.tobytes().decode())
        failed = multihost_utils.process_allgather(np.array(bool(problem))).any()
        if failed and jax.process_index() == 0:
            raise UserError(
                f"{self._roots[-1]}: v{version[0]}: another process cannot open its share; see its log"
            )
        if not failed and isinstance(self._own[0], StoredVectors):
            self._own = [self._own[0].placed()]

    def _opened(self, version: int, digest: str) -> tuple[list[Index], str]:
        """This process's share of a version, or why it cannot be opened."""
        problem = f"v{version} is not there"
        for root in self._roots:
            if version not in list_versions(root):
                continue
            try:
                # Process 0 has verified all files.
                share = (jax.process_index(), jax.process_count())
                opened = open_version(
                    root, version, expect_digest=digest, verify=False, share=share, place=False
                )
            except IndexVersionError as error:
                problem = str(error)
            else:
                return [opened], ""
        logger.error("the index cannot be opened here: %s", problem)
        return [], problem

    def _search_own(self, queries: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._own[0].search(queries, int(k[0]))
        if isinstance(self._own[0], DeviceIndex):
            return scores, rows
        # A program for each power of two, not for each number of queries.
        missing = ((0, next_power_of_two(max(len(queries), 1)) - len(queries)), (0, 0))
        scores_pqk, rows_pqk = (
            np.asarray(multihost_utils.process_allgather(np.pad(array, missing)))[:, : len(queries)]
            for array in (scores, rows)
        )
        return merge_top_k(scores_pqk, rows_pqk, int(k[0]))

    def _take_own(self, rows: np.ndarray) -> np.ndarray:
        return self._own[0].take(rows)


class TeamIndex:
    """An index that all processes hold a share of; implements `Index` in process 0, which alone asks."""

    def __init__(self, own: PartsIndex | StoredVectors, share: IndexShare):
        """`own` is the share of process 0, with all vectors."""
        self._own, self._share = own, share
        self.kind, self.version = own.kind, own.version
        self.shape, self.ids_hash = own.shape, own.ids_hash

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E]."""
        return self._share.search(queries, np.array([k]))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        # The file has them too, but devices are faster than a share.
        return self._own.take(rows) if isinstance(self._own, PartsIndex) else self._share.take(rows)
