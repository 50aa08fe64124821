"""Published versions of the index: written aside, measured, verified, renamed; readers trust nothing they have not checked."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import ml_dtypes
import numpy as np
from etils import epath

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.exact import ExactIndex
from search_r3_jax.retrieval.index import IndexKind, LocalIndex, probe_recall, resolve_kind, scann_available
from search_r3_jax.retrieval.scann_index import ScannIndex, ScannSettings

CURRENT, IN_USE, MANIFEST, TEMPORARY = "CURRENT", "IN_USE", "MANIFEST.json", ".tmp-"
CALLER_FIELDS = ("parameter_hash", "corpus_hash", "embed_token_id", "pooling", "encode_seconds")
PROBE_ROWS = 256
VectorDtype = Literal["float32", "bfloat16"]


class IndexGateError(UserError):
    """A new index that is not good enough to publish; the version before it stays current."""


class IndexVersionError(UserError):
    """A version that is missing, damaged or of another corpus or model; it must not be searched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """A published version.

    Attributes:
      step: snapshot step of the parameters that encoded it.
      path: its directory.
      manifest: all it says of itself, as in `MANIFEST.json`.
    """

    step: int
    path: epath.Path
    manifest: Mapping[str, Any]


def publish_version(
    root: epath.PathLike,
    *,
    step: int,
    vectors: np.ndarray,
    ids: Sequence[str],
    manifest_fields: Mapping[str, Any],
    kind: IndexKind = "scann",
    settings: ScannSettings | None = None,
    recall_gate: float = 0.99,
    probe_queries: np.ndarray | None = None,
    vector_dtype: VectorDtype = "float32",
    threads: int = 0,
) -> VersionInfo:
    """Build, measure and publish `v<step>` from unit vectors [N,E], then point CURRENT at it; the only writer of `root`.

    `manifest_fields` holds at least CALLER_FIELDS (times in seconds). `probe_queries` [Q,E], by default rows of the corpus,
    measure recall@10. Publishing again what is already there only moves CURRENT. Raises IndexGateError, leaving nothing
    behind, and IndexVersionError where another version has that step.
    """
    _check_arguments(step, vectors, ids, manifest_fields)
    root = epath.Path(root)
    final, work = root / f"v{step}", root / f"{TEMPORARY}v{step}"
    if final.exists():
        info = _confirm_existing(final, step, manifest_fields)
    else:
        # What a crashed attempt at the same step left behind.
        work.rmtree(missing_ok=True)
        work.mkdir(parents=True)
        try:
            own_fields = _write_version(work, step, vectors, ids, kind, settings, recall_gate, probe_queries, vector_dtype, threads)
            manifest = _write_manifest(work, {**manifest_fields, **own_fields})
            _verify(work, step)
            work.rename(final)
        except BaseException:
            work.rmtree(missing_ok=True)
            raise
        info = VersionInfo(step=step, path=final, manifest=manifest)
    _point(root, CURRENT, f"{step}\n")
    return info


def current_version(root: epath.PathLike) -> int | None:
    """The step CURRENT names, None before the first publication; raises IndexVersionError where it names none."""
    pointer = epath.Path(root) / CURRENT
    if not pointer.exists():
        return None
    text = pointer.read_bytes().strip()
    if not text.isdigit():
        raise IndexVersionError(f"{pointer}: {text[:40]!r} is not a step; write the step of a version into it")
    return int(text)


def list_versions(root: epath.PathLike) -> list[int]:
    """Steps of all complete versions, ascending."""
    root = epath.Path(root)
    if not root.exists():
        return []
    names = [path.name for path in root.iterdir() if (path / MANIFEST).exists()]
    return sorted(int(name[1:]) for name in names if name.startswith("v") and name[1:].isdecimal())


def open_version(
    root: epath.PathLike,
    step: int,
    *,
    expect_corpus_hash: str | None = None,
    expect_embed_token_id: int | None = None,
    verify: bool = True,
    threads: int = 0,
) -> LocalIndex:
    """Open `v<step>`, vectors memory-mapped; exact search where ScaNN is not installed; raises IndexVersionError on any doubt."""
    path = epath.Path(root) / f"v{step}"
    manifest = _verify(path, step) if verify else read_manifest(path, step)
    expectations = {"corpus_hash": expect_corpus_hash, "embed_token_id": expect_embed_token_id}
    for field, expected in expectations.items():
        if expected is not None and manifest.get(field) != expected:
            raise IndexVersionError(f"{path}: {field} is {manifest.get(field)!r}, expected {expected!r}; rebuild the index")
    try:
        ids = json.loads((path / "ids.json").read_text())
        vectors = _open_vectors(path, manifest["vector_dtype"])
        if vectors.shape != (manifest["rows"], manifest["dim"]):
            raise ValueError(f"vectors are {vectors.shape}")
        if manifest["kind"] == "scann" and scann_available():
            return ScannIndex.load(os.fspath(path / "scann"), vectors, ids, step, threads)
        return ExactIndex(vectors, ids, step)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserError) as error:
        raise IndexVersionError(f"{path}: cannot be opened: {' '.join(str(error).split())}") from error


def pin_versions(root: epath.PathLike, steps: Collection[int]) -> None:
    """Say which versions a reader has open, in place of those it named before; they are not pruned. The only writer of IN_USE."""
    _point(epath.Path(root), IN_USE, json.dumps(sorted(steps)) + "\n")


def pinned_versions(root: epath.PathLike) -> list[int]:
    """The versions that `pin_versions` named last, ascending; raises IndexVersionError where the file cannot be read."""
    file = epath.Path(root) / IN_USE
    if not file.exists():
        return []
    try:
        return [int(step) for step in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise IndexVersionError(f"{file}: is no list of steps ({error}); remove it") from error


def prune_versions(root: epath.PathLike, keep: int, pinned: Collection[int] = (), *, stale_seconds: float = 3600.0) -> list[int]:
    """Delete all but the newest `keep`, CURRENT, `pinned` and what a reader pinned, and temporaries `stale_seconds` old.

    Returns the deleted steps.
    """
    if keep < 0:
        raise ValueError(f"keep {keep} is negative")
    root = epath.Path(root)
    versions = list_versions(root)
    kept = {*versions[len(versions) - min(keep, len(versions)) :], *pinned, *pinned_versions(root), current_version(root)}
    doomed = [step for step in versions if step not in kept]
    for step in doomed:
        # Renamed first: a half-deleted directory must never look like a version.
        condemned = root / f"{TEMPORARY}pruned-v{step}"
        condemned.rmtree(missing_ok=True)
        (root / f"v{step}").rename(condemned)
        condemned.rmtree()
    for path in root.iterdir() if root.exists() else ():
        if path.name.startswith(TEMPORARY) and path.is_dir() and time.time() - path.stat().mtime >= stale_seconds:
            path.rmtree()
    return doomed


def _point(root: epath.Path, name: str, text: str) -> None:
    """Write a small file that readers see whole, old or new."""
    temporary = root / f"{TEMPORARY}{name}"
    temporary.write_text(text)
    temporary.replace(root / name)


def _check_arguments(step: int, vectors: np.ndarray, ids: Sequence[str], manifest_fields: Mapping[str, Any]) -> None:
    missing = [field for field in CALLER_FIELDS if field not in manifest_fields]
    if missing or step < 0:
        raise ValueError(f"step {step}, manifest_fields without {missing}: want a step ≥ 0 and all of {CALLER_FIELDS}")
    if vectors.ndim != 2 or not 0 < len(vectors) == len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"vectors {vectors.shape} and {len(set(ids))} different of {len(ids)} ids: want one id a row, none twice")


def _write_version(
    work: epath.Path,
    step: int,
    vectors: np.ndarray,
    ids: Sequence[str],
    kind: IndexKind,
    settings: ScannSettings | None,
    recall_gate: float,
    probe_queries: np.ndarray | None,
    vector_dtype: VectorDtype,
    threads: int,
) -> dict[str, Any]:
    """Write everything but the manifest and return our part of it; raises IndexGateError."""
    _write_vectors(work, vectors, vector_dtype)
    (work / "ids.json").write_text(json.dumps(list(ids)))
    # From here on the stored vectors, rounded as readers will see them.
    stored = _open_vectors(work, vector_dtype)
    _gate_norms(stored, step)
    exact = ExactIndex(stored, ids, step)
    started = time.perf_counter()
    index: LocalIndex = exact
    if resolve_kind(kind) == "scann":
        settings = settings or ScannSettings.for_corpus(*stored.shape)
        (work / "scann").mkdir()
        ScannIndex.build(stored, ids, step, settings, threads).save(os.fspath(work / "scann"))
        # Measured as loaded from the files, which is what readers get.
        index = ScannIndex.load(os.fspath(work / "scann"), stored, ids, step, threads)
    build_seconds = time.perf_counter() - started
    if probe_queries is None:
        probe_queries = stored[np.linspace(0, len(stored) - 1, min(PROBE_ROWS, len(stored))).astype(int)]
    recall = probe_recall(index, exact, np.asarray(probe_queries, dtype=np.float32), 10)
    if recall < recall_gate:
        raise IndexGateError(f"index v{step}: recall@10 {recall:.4f} is under the gate {recall_gate}; raise leaves_to_search or reorder")
    return {
        "step": step,
        "kind": index.kind,
        "settings": dataclasses.asdict(settings) if settings and index.kind == "scann" else {},
        "rows": len(stored),
        "dim": stored.shape[1],
        "vector_dtype": vector_dtype,
        "recall_at_10": recall,
        "recall_probes": len(probe_queries),
        "build_seconds": round(build_seconds, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gate_norms(vectors: np.ndarray, step: int, chunk: int = 65_536) -> None:
    """Raise IndexGateError unless every vector is finite and of length 1 (within bfloat16's rounding)."""
    for start in range(0, len(vectors), chunk):
        norms = np.linalg.norm(np.asarray(vectors[start : start + chunk], dtype=np.float32), axis=1)
        wrong = ~(np.abs(norms - 1) < 1e-2)
        if wrong.any():
            row = start + int(np.argmax(wrong))
            raise IndexGateError(f"index v{step}: the vector of row {row} is not finite or not of length 1; the encoder is broken")


def _write_vectors(path: epath.Path, vectors: np.ndarray, vector_dtype: VectorDtype) -> None:
    # npy knows no bfloat16: its bits are kept as uint16.
    stored = vectors.astype(ml_dtypes.bfloat16).view(np.uint16) if vector_dtype == "bfloat16" else np.asarray(vectors, np.float32)
    np.save(os.fspath(path / "vectors.npy"), stored, allow_pickle=False)


def _open_vectors(path: epath.Path, vector_dtype: str) -> np.ndarray:
    stored = np.load(os.fspath(path / "vectors.npy"), mmap_mode="r", allow_pickle=False)
    return stored.view(ml_dtypes.bfloat16) if vector_dtype == "bfloat16" else stored


def _write_manifest(path: epath.Path, fields: dict[str, Any]) -> dict[str, Any]:
    manifest = {**fields, "sha256": {name: _file_hash(path / name) for name in _file_names(path)}}
    manifest["manifest_sha256"] = manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(path: epath.Path, step: int) -> dict[str, Any]:
    """What the version in `path` says of itself; raises IndexVersionError where that is missing, damaged or of another step."""
    if not (path / MANIFEST).exists():
        raise IndexVersionError(f"{path}: no such index version (no {MANIFEST})")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sound = manifest["manifest_sha256"] == manifest_hash(manifest) and manifest["step"] == step
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexVersionError(f"{path / MANIFEST}: unreadable: {error}") from error
    if not sound:
        raise IndexVersionError(f"{path / MANIFEST}: does not match its own checksum or step {step}; rebuild the index")
    return manifest


def _verify(path: epath.Path, step: int) -> dict[str, Any]:
    """The manifest, after every file's checksum was found right and no file too many or too few."""
    manifest = read_manifest(path, step)
    hashes = manifest["sha256"]
    different = sorted(set(hashes) ^ set(_file_names(path)))
    if different:
        raise IndexVersionError(f"{path}: files missing or not in the manifest: {', '.join(different)}")
    for name, expected in hashes.items():
        if _file_hash(path / name) != expected:
            raise IndexVersionError(f"{path / name}: does not match its checksum; rebuild the index")
    return manifest


def _confirm_existing(path: epath.Path, step: int, manifest_fields: Mapping[str, Any]) -> VersionInfo:
    manifest = _verify(path, step)
    for field in ("parameter_hash", "corpus_hash", "embed_token_id", "pooling"):
        if manifest.get(field) != manifest_fields[field]:
            raise IndexVersionError(f"{path}: already published with another {field}; versions never change")
    return VersionInfo(step=step, path=path, manifest=manifest)


def _file_names(path: epath.Path) -> list[str]:
    names = [(folder / name).relative_to(path).as_posix() for folder, _, files in path.walk() for name in files]
    return sorted(set(names) - {MANIFEST})


def _file_hash(path: epath.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    fields = {field: value for field, value in manifest.items() if field != "manifest_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
