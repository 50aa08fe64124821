"""Versions of an index that a reader refused: it says so beside them, and the indexer makes them anew."""

from __future__ import annotations

from etils import epath

from search_r3_jax.retrieval import storage

REFUSED = "REFUSED"


def refuse_version(root: epath.PathLike, step: int) -> None:
    """Say that `v<step>` failed a reader's checks."""
    storage.write_pointer(storage.open_root(root), REFUSED, f"{step}\n")


def refused_version(root: epath.PathLike) -> int | None:
    """The version that was refused last; None where there is none."""
    text = storage.read_pointer(storage.open_root(root), REFUSED)
    return int(text) if text is not None and text.strip().isdigit() else None


def discard_version(root: epath.PathLike, step: int) -> None:
    """Delete a version that must not be searched, and what was said of it; readers keep the files they have open."""
    root = storage.open_root(root)
    path = storage.version_path(root, step)
    if path.exists():
        storage.remove_version(path)
    (root / REFUSED).unlink(missing_ok=True)
