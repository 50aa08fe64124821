"""Approximate search with ScaNN (Guo et al., arXiv 1908.10396).

An index is immutable, numbers its documents by row, and is measured before it is used.
"""

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self, cast

import numpy as np

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.protocol import check_corpus, check_queries, hash_of_ids, pad_results

SETTINGS_FILE = "settings.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannSettings:
    """Settings of ScaNN; the thresholds follow ScaNN's guide (scann/docs/algorithms.md).

    Attributes:
      method: score everything exactly, score everything by asymmetric hashing (ah), or only the nearest
          partitions (tree_ah).
      leaves: partitions of the tree; about √N.
      leaves_to_search: partitions searched per query, at least.
      spherical: partitions are learnt by spherical k-means, which suits unit vectors.
      soar_lambda: a document is in a second partition too, chosen by SOAR (Sun et al., arXiv 2404.00774); 0
          has it in one.
      dims_per_block: dimensions hashed together.
      anisotropic_threshold: weight of the quantisation error along the vector; 0.2 suits unit vectors.
      reorder: hashed candidates scored again exactly, at least; never fewer than four times k.
      reorder_dtype: how vectors are kept for that second scoring; bfloat16 halves the memory.
      training_sample: rows the partitions and the codebook are learnt from.
    """

    method: Literal["brute_force", "ah", "tree_ah"]
    leaves: int = 1
    leaves_to_search: int = 1
    spherical: bool = False
    soar_lambda: float = 0.0
    dims_per_block: int = 2
    anisotropic_threshold: float = 0.2
    reorder: int = 200
    reorder_dtype: Literal["float32", "bfloat16"] = "float32"
    training_sample: int = 100_000

    @classmethod
    def for_corpus(cls, rows: int, dim: int) -> Self:
        """Choose by rows: brute force below 20,000, hashing and rescoring below 100,000, else a tree.

        `dim` is the width of a row.
        """
        dims_per_block = min(2, dim)
        if rows < 20_000:
            return cls(method="brute_force", dims_per_block=dims_per_block)
        if rows < 100_000:
            return cls(method="ah", dims_per_block=dims_per_block)
        leaves = round(math.sqrt(rows))
        # On 100,000 MiniLM vectors of real texts, searching an eighth has recall@10 0.996; with plain
        # partitions, 0.968.
        return cls(
            method="tree_ah",
            leaves=leaves,
            leaves_to_search=math.ceil(leaves / 8),
            spherical=True,
            soar_lambda=1.0,
            dims_per_block=dims_per_block,
        )


class ScannIndex:
    """ScaNN over unit vectors [N,E]; implements `Index`. Make one with `build` or `load`."""

    kind: str = "scann"

    def __init__(
        self,
        searcher: Any,
        vectors: np.ndarray,
        ids: Sequence[str],
        version: int,
        settings: ScannSettings,
        threads: int,
    ) -> None:
        """Wrap a ScaNN searcher whose datapoint i is row i of `vectors`."""
        self.vectors = vectors
        self.ids = ids
        self.ids_hash = hash_of_ids(ids)
        self.version = version
        self.settings = settings
        self._searcher = searcher
        self._parallel = threads != 1
        if threads > 0:
            searcher.set_num_threads(threads)

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        ids: Sequence[str],
        version: int,
        settings: ScannSettings | None = None,
        threads: int = 0,
    ) -> Self:
        """Train and fill an index over vectors [N,E]; `threads` 0 means all.

        Raises UserError where ScaNN is not installed.
        """
        check_corpus(vectors, ids)
        settings = settings or ScannSettings.for_corpus(*vectors.shape)
        database = np.ascontiguousarray(vectors, dtype=np.float32)
        scann = _import_scann()
        builder = scann.scann_ops_pybind.builder(database, 10, "dot_product").set_n_training_threads(threads)
        if settings.method == "brute_force":
            builder = builder.score_brute_force()
        else:
            if settings.method == "tree_ah":
                builder = builder.tree(
                    num_leaves=settings.leaves,
                    num_leaves_to_search=settings.leaves_to_search,
                    training_sample_size=settings.training_sample,
                    spherical=settings.spherical,
                    soar_lambda=settings.soar_lambda or None,
                )
            builder = builder.score_ah(
                settings.dims_per_block,
                anisotropic_quantization_threshold=settings.anisotropic_threshold,
                training_sample_size=settings.training_sample,
            ).reorder(settings.reorder, quantize=scann.ReorderType[settings.reorder_dtype.upper()])
        return cls(builder.build(), vectors, ids, version, settings, threads)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products [Q,k] float32, descending, and rows [Q,k] int32 for queries [Q,E].

        −inf and −1 past the last document.
        """
        queries = check_queries(queries, k, self.vectors.shape[1])
        wanted = min(k, len(self.ids))
        if len(queries) == 0:
            return pad_results(np.empty((0, wanted)), np.empty((0, wanted)), k)
        leaves = self.settings.leaves_to_search
        scores, rows = self._search_leaves(queries, wanted, leaves)
        # Search more partitions where they hold fewer than k documents.
        while (rows < 0).any() and leaves < self.settings.leaves:
            leaves = min(2 * leaves, self.settings.leaves)
            short = (rows < 0).any(axis=1)
            scores[short], rows[short] = self._search_leaves(queries[short], wanted, leaves)
        return pad_results(scores, rows, k)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, E)."""
        return (len(self.vectors), self.vectors.shape[1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors [n,E] float32 of rows [n], in their order."""
        return np.asarray(self.vectors[rows], dtype=np.float32)

    def save(self, directory: str | Path) -> None:
        """Write ScaNN's files and the settings into an existing local directory.

        Raises OSError when the disk refuses.
        """
        directory = Path(directory)
        try:
            # Relative asset paths, because a complete version is renamed.
            self._searcher.serialize(str(directory), relative_path=True)
        except RuntimeError as error:
            # ScaNN raises this where the disk is full.
            raise OSError(f"{directory}: ScaNN cannot write its files: {error}") from error
        (directory / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n")

    @classmethod
    def load(
        cls, directory: str | Path, vectors: np.ndarray, ids: Sequence[str], version: int, threads: int = 0
    ) -> Self:
        """Load an index that `save` wrote.

        Raises UserError if ScaNN is missing or the files do not fit `vectors` [N,E].
        """
        check_corpus(vectors, ids)
        directory = Path(directory)
        # ScaNN would unpickle this file; we never write one.
        if (directory / "scann_docids.pkl").exists():
            raise UserError(
                f"{directory}: holds scann_docids.pkl, which is no part of an index; delete it and rebuild"
            )
        settings = ScannSettings(**json.loads((directory / SETTINGS_FILE).read_text()))
        searcher = _import_scann().scann_ops_pybind.load_searcher(
            str(directory), assets_backcompat_shim=False
        )
        if searcher.size() != len(vectors):
            raise UserError(
                f"{directory}: ScaNN holds {searcher.size()} rows, the vectors {len(vectors)}; rebuild the "
                "index"
            )
        return cls(searcher, vectors, ids, version, settings, threads)

    def _search_leaves(self, queries: np.ndarray, k: int, leaves: int) -> tuple[np.ndarray, np.ndarray]:
        search = self._searcher.search_batched_parallel if self._parallel else self._searcher.search_batched
        if self.settings.method == "brute_force":
            rows, scores = search(queries, final_num_neighbors=k)
        else:
            reorder = max(self.settings.reorder, 4 * k)
            in_tree = leaves if self.settings.method == "tree_ah" else None
            rows, scores = search(
                queries, final_num_neighbors=k, pre_reorder_num_neighbors=reorder, leaves_to_search=in_tree
            )
        # ScaNN fills up with row 0 and score NaN.
        missing = np.isnan(scores)
        return np.where(missing, -np.inf, scores).astype(np.float32), np.where(
            missing, -1, rows.astype(np.int64)
        ).astype(np.int32)


def _import_scann() -> ModuleType:
    """Import ScaNN without TensorFlow, which it would import if installed.

    Raises UserError where ScaNN has no wheel.
    """
    if not scann_available():
        raise UserError(
            "index kind 'scann' needs the package scann (Linux only): install it, or choose 'exact'"
        )
    modules = cast(dict[str, Any], sys.modules)
    blocked = "tensorflow" not in modules
    if blocked:
        modules["tensorflow"] = None
    try:
        import scann
    finally:
        if blocked:
            del modules["tensorflow"]
    return scann


def scann_available() -> bool:
    """Whether ScaNN is installed (it has wheels for Linux only)."""
    return importlib.util.find_spec("scann") is not None
