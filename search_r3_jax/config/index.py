"""The index that stage 2 searches, and the indexer that rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from search_r3_jax.config.mesh import MeshConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """The index that stage 2 searches, and the indexer that rebuilds it.

    Attributes:
        kind: `scann`: ScaNN. `exact`: exact search. `device`: all vectors are spread over the trainer's
            devices and compared there, on TPUs approximately unless recall_gate is 1. `auto`: ScaNN where it
            is installed, else exact search.
        source: Where its vectors come from. `snapshots`: an indexer beside the trainer builds versions from
            the run's snapshots. `trainer`: before each step the trainer encodes documents_per_step documents
            with its newest snapshot, and an indexer that needs no accelerator builds versions from the
            vectors. `rolling`, with kind `device`: before each step the trainer encodes documents_per_step
            documents with the current parameters and replaces their vectors in the index.
        documents_per_step: With source `rolling` or `trainer`: documents to encode a step. The whole corpus
            takes N / documents_per_step steps.
        scoring: Which vectors rank the candidates. `fresh`: re-encode them with the current parameters, up to
            refresh_budget documents a step; the rest keep the index's. `stale`: the index's own.
            They also rank under `consistent_stale`, which embeds the replies too with the index's checkpoint.
        candidates: Candidates per query that the index proposes, beside the relevant documents.
        neighbours: For each candidate, add this many of its nearest documents as candidates.
        refresh_budget: Documents to re-encode per step, at most. 0: the index alone ranks.
        overlay_max_age_steps: Steps for which a re-encoded vector is used in place of the index's. 0: only in
            its own step.
        drift_every: Steps between drift measurements on a fixed part of the corpus. Where it has drifted, a
            checkpoint is saved. 0 never measures.
        drift_documents: Documents that a drift measurement encodes.
        drift_cosine: Mean cosine to the last checkpoint's vectors below which it has drifted.
        drift_overlap: Share of a document's ten nearest that are unchanged, below which it has drifted.
        max_index_age_steps: Age in steps above which the index is stale. 0: no limit.
        on_stale_index: What to do with an index older than max_index_age_steps: `wait` for a newer
            one, `warn`, or save and `stop`.
        parts: Parts of ScaNN, each over its share of the rows. Several processes load and search a share of
            the parts each, for a corpus beyond one host's memory.
        recall_gate: Smallest recall@10 against exact search at which a version is published. With
            kind `device`: the recall asked of the TPU's approximate search; 1 is exact.
        vector_dtype: How a version stores its vectors.
        folder: Where versions are kept, a folder or a bucket (`gs://…`). Empty: `index` in the run folder.
        keep_versions: Newest versions to keep.
        local: Start an indexer beside the trainer. With `--index.no-local`, start one yourself, by the
            command `search-r3 indexer`.
        silent_seconds: Restart an indexer that shows no sign of life for this long.
        nice: Unix nice value added to the indexer process, 0 to 19.
        threads: CPU threads of the indexer. 0 lets XLA choose.
        cores: CPU cores that the indexer may use. Empty: all.
        mesh: Mesh of an indexer process.
    """

    kind: Literal["auto", "scann", "exact", "device"] = "auto"
    source: Literal["snapshots", "trainer", "rolling"] = "snapshots"
    documents_per_step: int = 1024
    scoring: Literal["fresh", "stale", "consistent_stale"] = "fresh"
    candidates: int = 64
    neighbours: int = 0
    refresh_budget: int = 256
    overlay_max_age_steps: int = 4
    drift_every: int = 0
    drift_documents: int = 1000
    drift_cosine: float = 0.95
    drift_overlap: float = 0.7
    max_index_age_steps: int = 0
    on_stale_index: Literal["wait", "warn", "stop"] = "wait"
    parts: int = 1
    recall_gate: float = 0.99
    vector_dtype: Literal["float32", "bfloat16"] = "float32"
    folder: str = ""
    keep_versions: int = 2
    local: bool = True
    silent_seconds: float = 600.0
    nice: int = 10
    threads: int = 0
    cores: tuple[int, ...] = ()
    mesh: MeshConfig = field(default_factory=MeshConfig)
