"""Storage of versions: a local folder, which can rename, or a bucket of whole objects."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from etils import epath
from fsspec.config import conf
from fsspec.registry import get_filesystem_class

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.store.manifest import (
    MANIFEST,
    IndexVersionError,
    check_files,
    file_names,
    read_chunks,
    read_manifest,
)

TEMPORARY = ".tmp-"


def open_root(root: epath.PathLike) -> epath.Path:
    """Open a folder of versions; raises UserError for a bucket that no installed package can read."""
    root = epath.Path(root)
    if is_bucket(root):
        scheme = os.fspath(root).split("://")[0]
        # A cached listing hides files that other processes write later; it must be off before the first
        # access.
        conf.setdefault(scheme, {})["use_listings_cache"] = False
        try:
            get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise UserError(f"{root}: {' '.join(str(error).split())} (pip install)") from error
    return root


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def version_path(root: epath.Path, step: int) -> epath.Path:
    """The path of the version of `step`, present or not."""
    return root / f"v{step}"


def version_steps(root: epath.Path) -> list[int]:
    """Steps of the folders that are named like versions, complete or not, ascending."""
    return sorted(int(name[1:]) for name in _names(root) if name.startswith("v") and name[1:].isdecimal())


def local_folder(root: epath.Path) -> Path:
    """This user's local folder for the files of a bucket: the same at every call."""
    name = hashlib.sha256(os.fspath(root).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"search_r3_jax-{os.getuid()}" / name


@contextlib.contextmanager
def staging(root: epath.Path, step: int) -> Iterator[epath.Path]:
    """An empty local folder to build a version in; deleted at exit, unless it was renamed."""
    parent = epath.Path(local_folder(root) / "building") if is_bucket(root) else root
    work = parent / f"{TEMPORARY}v{step}"
    # Left behind by an interrupted attempt at the same step.
    work.rmtree(missing_ok=True)
    try:
        work.mkdir(parents=True)
        yield work
    finally:
        work.rmtree(missing_ok=True)


def publish_folder(work: epath.Path, final: epath.Path) -> None:
    """Publish a complete local folder as the version `final`.

    A local folder is renamed at once; a bucket gets file by file, the manifest last.
    """
    if not is_bucket(final):
        work.rename(final)
        return
    _remove_leftovers(final.parent)
    try:
        for name in [*file_names(work), MANIFEST]:
            _copy(work / name, final / name)
    except BaseException:
        # Files that cannot be removed now are no version, and are removed at the next publication.
        with contextlib.suppress(OSError):
            remove_version(final)
        raise


def remove_version(path: epath.Path) -> None:
    """Delete a version; a partly deleted one no longer counts as a version."""
    if is_bucket(path):
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)
    else:
        condemned = path.parent / f"{TEMPORARY}pruned-{path.name}"
        condemned.rmtree(missing_ok=True)
        path.rename(condemned)
        condemned.rmtree()


def remove_stale(folder: epath.Path, seconds: float) -> None:
    """Delete temporary folders older than `seconds` in a local folder; a bucket has none."""
    if is_bucket(folder):
        return
    for name in _names(folder):
        path = folder / name
        if name.startswith(TEMPORARY) and path.is_dir() and time.time() - path.stat().mtime >= seconds:
            path.rmtree(missing_ok=True)


def write_pointer(root: epath.Path, name: str, text: str) -> None:
    """Write a small file atomically: readers see the old or the new content."""
    if is_bucket(root):
        (root / name).write_text(text)
        return
    temporary = root / f"{TEMPORARY}{name}"
    try:
        temporary.write_text(text)
        temporary.replace(root / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_pointer(root: epath.Path, name: str) -> bytes | None:
    """Read the content of `write_pointer`; None before the first write."""
    try:
        return (root / name).read_bytes()
    except FileNotFoundError:
        return None


def fetch_version(path: epath.Path, step: int, cache: Path) -> tuple[epath.Path, dict[str, Any]]:
    """Copy a version from a bucket into `cache` and check it; returns the copy and its manifest.

    A valid copy is reused. Copies of versions that the bucket no longer has are deleted. Raises
    IndexVersionError when the version cannot be copied.
    """
    copy = epath.Path(cache) / path.name
    work = copy.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        manifest = read_manifest(path, step)
        _tidy(copy.parent, path.parent)
        if not _sound(copy, manifest):
            work.rmtree(missing_ok=True)
            for name in manifest["sha256"]:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(path / name, work / name)
            check_files(work, manifest)
            # Another reader may have copied it meanwhile, and have it open.
            if not _sound(copy, manifest):
                copy.rmtree(missing_ok=True)
                work.rename(copy)
        return copy, manifest
    except OSError as error:
        raise IndexVersionError(
            f"{path}: cannot be copied to {cache} ({error.strerror or error}); make room or try again"
        ) from error
    finally:
        work.rmtree(missing_ok=True)


def _sound(copy: epath.Path, manifest: dict[str, Any]) -> bool:
    try:
        check_files(copy, manifest)
    except IndexVersionError:
        return False
    return True


def _tidy(cache: epath.Path, root: epath.Path) -> None:
    for step in version_steps(cache):
        if not (version_path(root, step) / MANIFEST).exists():
            version_path(cache, step).rmtree(missing_ok=True)
    # So old that no other reader is still copying into it.
    remove_stale(cache, seconds=86_400.0)


def _remove_leftovers(root: epath.Path) -> None:
    """Delete the remains of interrupted publications and deletions in a bucket; only its writer may."""
    for step in version_steps(root):
        if not (version_path(root, step) / MANIFEST).exists():
            version_path(root, step).rmtree(missing_ok=True)


def _names(folder: epath.Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def _copy(source: epath.Path, target: epath.Path) -> None:
    with target.open("wb") as opened:
        # epath's types do not distinguish text from bytes.
        file = cast(BinaryIO, opened)
        for chunk in read_chunks(source):
            file.write(chunk)
