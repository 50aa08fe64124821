"""Versions of an index that a reader refused: it says so beside them, and the indexer makes them anew."""

from __future__ import annotations

from etils import epath

from search_r3_jax.retrieval.versions import MANIFEST

REFUSED = "REFUSED"


def refuse_version(root: epath.PathLike, step: int) -> None:
    """Say that `v<step>` failed a reader's checks."""
    (epath.Path(root) / REFUSED).write_text(f"{step}\n")


def refused_version(root: epath.PathLike) -> int | None:
    """The version that was refused last; None where there is none, or while the file is being written."""
    file = epath.Path(root) / REFUSED
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdecimal() else None


def discard_version(root: epath.PathLike, step: int) -> None:
    """Delete a version that must not be searched, and what was said of it; readers keep the files they have open."""
    root = epath.Path(root)
    # First what makes it a version.
    (root / f"v{step}" / MANIFEST).unlink(missing_ok=True)
    (root / f"v{step}").rmtree(missing_ok=True)
    (root / REFUSED).unlink(missing_ok=True)
