"""Published index versions: built aside, measured, verified, published; readers verify again."""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.build import resolve_kind
from search_r3_jax.retrieval.index.device import StoredVectors
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.parts import part_ranges
from search_r3_jax.retrieval.index.protocol import IndexKind, LocalIndex, probe_recall
from search_r3_jax.retrieval.index.scann import ScannSettings, scann_available
from search_r3_jax.retrieval.store import manifest as version_files
from search_r3_jax.retrieval.store import storage
from search_r3_jax.retrieval.store.manifest import (
    IDS,
    MANIFEST,
    VECTORS,
    IndexVersionError,
    check_hashes,
    read_manifest,
    write_manifest,
)
from search_r3_jax.retrieval.store.scann_files import load_scann, write_scann
from search_r3_jax.retrieval.store.vector_files import VectorDtype, chunks_of, open_vectors, write_vectors

__all__ = [
    "IndexGateError",
    "IndexVersionError",
    "PublishOptions",
    "VersionInfo",
    "current_version",
    "delete_version",
    "list_versions",
    "mark_rejected",
    "open_version",
    "pin_versions",
    "pinned_versions",
    "prune_versions",
    "publish_version",
    "read_version",
    "rejected_version",
]

CURRENT, IN_USE = "CURRENT", "IN_USE"
# Names the version that a reader rejected; the indexer builds it again. The file keeps the name of earlier
# releases.
REJECTED = "REFUSED"
CALLER_FIELDS = ("parameter_hash", "corpus_hash", "embed_token_id", "pooling", "encode_seconds")
# Versions are the same where these are.
IDENTITY_FIELDS = ("parameter_hash", "corpus_hash", "embed_token_id", "pooling")
PROBE_ROWS = 256


class IndexGateError(UserError):
    """A new version is not good enough to publish; the current one stays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """A published version.

    Attributes:
      step: checkpoint step of the parameters that encoded it.
      path: its directory.
      manifest: the content of `MANIFEST.json`.
    """

    step: int
    path: epath.Path
    manifest: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """How a version is built and measured.

    Attributes:
      kind: of the index.
      settings: of ScaNN; None chooses them by the corpus' size.
      recall_gate: smallest recall@10 against exact search at which the version is published.
      probe_queries: unit vectors [Q,E] that measure it; None takes rows of the corpus.
      vector_dtype: how vectors are stored.
      threads: that build and search ScaNN; 0 is all.
      parts: of ScaNN, each built and loaded by itself.
    """

    kind: IndexKind = "scann"
    settings: ScannSettings | None = None
    recall_gate: float = 0.99
    probe_queries: np.ndarray | None = None
    vector_dtype: VectorDtype = "float32"
    threads: int = 0
    parts: int = 1


def publish_version(
    root: epath.PathLike,
    *,
    step: int,
    vectors: np.ndarray,
    ids: Sequence[str],
    manifest_fields: Mapping[str, Any],
    options: PublishOptions | None = None,
) -> VersionInfo:
    """Build, measure and publish `v<step>` from unit vectors [N,E], then point CURRENT at it.

    The caller must be the only writer of `root`. `root` is a local folder or a bucket (`gs://…`); `vectors`
    may be memory-mapped. `manifest_fields` holds at least CALLER_FIELDS (times in seconds). `probe_queries`
    [Q,E], by default rows of the corpus, measure recall@10. Publishing again what is already there only moves
    CURRENT. Raises IndexGateError, IndexVersionError where another version has that step, and OSError when
    the disk or the bucket refuses; CURRENT then stays as it was, and nothing half-made is a version.
    """
    _check_arguments(step, vectors, ids, manifest_fields)
    root = storage.open_root(root)
    final = storage.version_path(root, step)
    # In a bucket, files without a manifest are from an interrupted attempt.
    if (final / MANIFEST if storage.is_bucket(root) else final).exists():
        info = _confirm_existing(final, step, manifest_fields)
    else:
        with storage.staging(root, step) as work:
            index_fields = _write_version(work, step, vectors, ids, options or PublishOptions())
            manifest = write_manifest(work, {**manifest_fields, **index_fields})
            version_files.verify(work, step)
            storage.publish_folder(work, final)
        info = VersionInfo(step=step, path=final, manifest=manifest)
    storage.write_pointer(root, CURRENT, f"{step}\n")
    return info


def current_version(root: epath.PathLike) -> int | None:
    """The step that CURRENT names; None before the first publication.

    Raises IndexVersionError where it names none.
    """
    text = storage.read_pointer(storage.open_root(root), CURRENT)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise IndexVersionError(
            f"{epath.Path(root) / CURRENT}: {text[:40]!r} is not a step; write the step of a version into it"
        )
    return int(text)


def list_versions(root: epath.PathLike) -> list[int]:
    """Steps of all complete versions, ascending."""
    root = storage.open_root(root)
    return [
        step for step in storage.version_steps(root) if (storage.version_path(root, step) / MANIFEST).exists()
    ]


def read_version(root: epath.PathLike, step: int) -> VersionInfo:
    """Read the manifest of `v<step>`, not its files.

    Raises IndexVersionError where there is none or its manifest is damaged.
    """
    path = storage.version_path(storage.open_root(root), step)
    return VersionInfo(step=step, path=path, manifest=read_manifest(path, step))


def open_version(
    root: epath.PathLike,
    step: int,
    *,
    expect_corpus_hash: str | None = None,
    expect_embed_token_id: int | None = None,
    expect_digest: str | None = None,
    verify: bool = True,
    threads: int = 0,
    cache: Path | None = None,
    share: tuple[int, int] = (0, 1),
    place: bool = True,
) -> LocalIndex:
    """Open `v<step>` with memory-mapped vectors; raises IndexVersionError on any doubt.

    Search is exact where ScaNN is not installed. Of an index in parts, process p of P loads every P-th part
    from p on; `share` is (p, P). With `place`, a `device` index is put on this process's devices. A
    version in a bucket is copied into `cache`, by default a folder for temporary files that is the same at
    every call, and always verified; a sound copy is not copied again.
    """
    root = storage.open_root(root)
    path = storage.version_path(root, step)
    expectations = {
        "corpus_hash": expect_corpus_hash,
        "embed_token_id": expect_embed_token_id,
        "manifest_sha256": expect_digest,
    }
    if storage.is_bucket(root):
        # Check the small manifest before the large copy.
        _check_expected(path, read_manifest(path, step), expectations)
        path, manifest = storage.fetch_version(
            path, step, storage.local_folder(root) if cache is None else cache
        )
    else:
        manifest = version_files.verify(path, step) if verify else read_manifest(path, step)
    _check_expected(path, manifest, expectations)
    try:
        ids = json.loads((path / IDS).read_text())
        vectors = open_vectors(path / VECTORS, manifest["vector_dtype"])
        if vectors.shape != (manifest["rows"], manifest["dim"]):
            raise ValueError(f"vectors are {vectors.shape}")
        if manifest["kind"] == "device":
            recall, digest = manifest["settings"]["recall"], manifest["manifest_sha256"]
            stored = StoredVectors(vectors, ids, step, recall=recall, digest=digest)
            return stored.placed() if place else stored
        if manifest["kind"] == "scann" and scann_available():
            parts = manifest.get("parts", 1)
            digest = manifest["manifest_sha256"]
            return load_scann(
                path, vectors, ids, step, parts=parts, share=share, digest=digest, threads=threads
            )
        return ExactIndex(vectors, ids, step)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserError) as error:
        raise IndexVersionError(f"{path}: cannot be opened: {' '.join(str(error).split())}") from error


def pin_versions(root: epath.PathLike, steps: Collection[int]) -> None:
    """Replace the versions that a reader has open by `steps`; pinned versions are not pruned.

    The only writer of IN_USE.
    """
    root = storage.open_root(root)
    # A replay pins before this run's first version is published.
    root.mkdir(parents=True, exist_ok=True)
    storage.write_pointer(root, IN_USE, json.dumps(sorted(steps)) + "\n")


def pinned_versions(root: epath.PathLike) -> list[int]:
    """The versions of the last `pin_versions`, ascending.

    Raises IndexVersionError where the file cannot be read.
    """
    text = storage.read_pointer(storage.open_root(root), IN_USE)
    try:
        return [] if text is None else [int(step) for step in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise IndexVersionError(
            f"{epath.Path(root) / IN_USE}: is no list of steps ({error}); remove it"
        ) from error


def prune_versions(
    root: epath.PathLike, keep: int, pinned: Collection[int] = (), *, stale_seconds: float = 3600.0
) -> list[int]:
    """Delete all versions but the newest `keep`, CURRENT, and pinned ones; returns their steps.

    `pinned` adds to those that a reader pinned. Temporary folders `stale_seconds` old are deleted too.
    """
    if keep < 0:
        raise ValueError(f"keep {keep} is negative")
    root = storage.open_root(root)
    versions = list_versions(root)
    kept = {
        *versions[len(versions) - min(keep, len(versions)) :],
        *pinned,
        *pinned_versions(root),
        current_version(root),
    }
    doomed = [step for step in versions if step not in kept]
    for step in doomed:
        storage.remove_version(storage.version_path(root, step))
    storage.remove_stale(root, stale_seconds)
    return doomed


def mark_rejected(root: epath.PathLike, step: int) -> None:
    """Mark `v<step>` as rejected by a reader's checks."""
    storage.write_pointer(storage.open_root(root), REJECTED, f"{step}\n")


def rejected_version(root: epath.PathLike) -> int | None:
    """The version that was rejected last; None where there is none."""
    text = storage.read_pointer(storage.open_root(root), REJECTED)
    return int(text) if text is not None and text.strip().isdigit() else None


def delete_version(root: epath.PathLike, step: int) -> None:
    """Delete a version that must not be searched, and its marks.

    Readers keep the files they have open.
    """
    root = storage.open_root(root)
    path = storage.version_path(root, step)
    if path.exists():
        storage.remove_version(path)
    (root / REJECTED).unlink(missing_ok=True)


def _check_arguments(
    step: int, vectors: np.ndarray, ids: Sequence[str], manifest_fields: Mapping[str, Any]
) -> None:
    missing = [field for field in CALLER_FIELDS if field not in manifest_fields]
    if missing or step < 0:
        raise ValueError(
            f"step {step}, manifest_fields without {missing}: want a step ≥ 0 and all of {CALLER_FIELDS}"
        )
    if vectors.ndim != 2 or not 0 < len(vectors) == len(ids) or len(set(ids)) != len(ids):
        raise ValueError(
            f"vectors {vectors.shape} and {len(set(ids))} different of {len(ids)} ids: want one id a row, "
            "none twice"
        )


def _write_version(
    work: epath.Path,
    step: int,
    vectors: np.ndarray,
    ids: Sequence[str],
    options: PublishOptions,
) -> dict[str, Any]:
    """Write everything but the manifest; returns the fields for it.

    Raises IndexGateError.
    """
    settings, probe_queries = options.settings, options.probe_queries
    write_vectors(work / VECTORS, chunks_of(vectors), vectors.shape, options.vector_dtype)
    (work / IDS).write_text(json.dumps(list(ids)))
    # Use the stored vectors from here on, rounded as readers see them.
    stored = open_vectors(work / VECTORS, options.vector_dtype)
    _gate_norms(stored, step)
    exact = ExactIndex(stored, ids, step)
    started = time.perf_counter()
    index: LocalIndex = exact
    kind, parts = resolve_kind(options.kind), 1
    if kind == "scann":
        parts = len(part_ranges(len(stored), options.parts))
        settings = write_scann(work, stored, ids, parts=parts, settings=settings, threads=options.threads)
        # Measure the index as loaded from the files, as readers do.
        index = load_scann(work, stored, ids, step, parts=parts, threads=options.threads)
    build_seconds = time.perf_counter() - started
    if probe_queries is None:
        probe_queries = stored[np.linspace(0, len(stored) - 1, min(PROBE_ROWS, len(stored))).astype(int)]
    recall = probe_recall(index, exact, np.asarray(probe_queries, dtype=np.float32), 10)
    if recall < options.recall_gate:
        raise IndexGateError(
            f"index v{step}: recall@10 {recall:.4f} is under the gate {options.recall_gate}; raise "
            "leaves_to_search or reorder"
        )
    return {
        "step": step,
        "kind": kind,
        "settings": _settings_of(kind, settings, options),
        "parts": parts,
        "rows": len(stored),
        "dim": stored.shape[1],
        "vector_dtype": options.vector_dtype,
        "recall_at_10": recall,
        "recall_probes": len(probe_queries),
        "build_seconds": round(build_seconds, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _settings_of(kind: str, settings: ScannSettings | None, options: PublishOptions) -> dict[str, Any]:
    if kind == "device":
        return {"recall": options.recall_gate}
    return dataclasses.asdict(settings) if settings and kind == "scann" else {}


def _gate_norms(vectors: np.ndarray, step: int) -> None:
    """Raise IndexGateError unless every vector is finite and of length 1 (within bfloat16's rounding)."""
    start = 0
    for chunk in chunks_of(vectors):
        wrong = ~(np.abs(np.linalg.norm(np.asarray(chunk, dtype=np.float32), axis=1) - 1) < 1e-2)
        if wrong.any():
            row = start + int(np.argmax(wrong))
            raise IndexGateError(
                f"index v{step}: the vector of row {row} is not finite or not of length 1; the encoder is "
                "broken"
            )
        start += len(chunk)


def _check_expected(path: epath.Path, manifest: Mapping[str, Any], expectations: Mapping[str, Any]) -> None:
    for field, expected in expectations.items():
        if expected is not None and manifest.get(field) != expected:
            raise IndexVersionError(
                f"{path}: {field} is {manifest.get(field)!r}, expected {expected!r}; rebuild the index"
            )


def _confirm_existing(path: epath.Path, step: int, manifest_fields: Mapping[str, Any]) -> VersionInfo:
    if storage.is_bucket(path):
        manifest = read_manifest(path, step)
        check_hashes(path, manifest)
    else:
        manifest = version_files.verify(path, step)
    for field in IDENTITY_FIELDS:
        if manifest.get(field) != manifest_fields.get(field):
            raise IndexVersionError(f"{path}: already published with another {field}; versions never change")
    return VersionInfo(step=step, path=path, manifest=manifest)
