"""The manifest of an index version: all its files with their checksums, and its checksum."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from etils import epath

from search_r3_jax.errors import UserError
from search_r3_jax.files import file_sha256

MANIFEST, VECTORS, IDS = "MANIFEST.json", "vectors.npy", "ids.json"
READ_BYTES = 1 << 22


class IndexVersionError(UserError):
    """A version is missing, damaged, or of another corpus or model; it must not be searched."""


def write_manifest(path: epath.Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of the local folder `path`.

    It holds `fields`, the checksum of each file there, and a checksum of the manifest.
    """
    manifest = {**fields, "sha256": {name: file_sha256(path / name) for name in file_names(path)}}
    manifest["manifest_sha256"] = manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(path: epath.Path, step: int) -> dict[str, Any]:
    """Read the manifest of a version.

    Raises IndexVersionError where there is none, or none of `step`, or it is damaged.
    """
    if not (path / MANIFEST).exists():
        raise IndexVersionError(f"{path}: no such index version (no {MANIFEST})")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sound = manifest["manifest_sha256"] == manifest_hash(manifest) and manifest["step"] == step
        # A path that leaves the folder would let a copy of the version write outside of it.
        inside = all(
            ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
            for name in manifest["sha256"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexVersionError(f"{path / MANIFEST}: unreadable: {error}") from error
    if not sound:
        raise IndexVersionError(
            f"{path / MANIFEST}: does not match its own checksum or step {step}; rebuild the index"
        )
    if not inside:
        raise IndexVersionError(
            f"{path / MANIFEST}: sha256: names a file outside its folder; rebuild the index"
        )
    return manifest


def verify(path: epath.Path, step: int) -> dict[str, Any]:
    """Run `check_files` on a local folder; returns its manifest."""
    manifest = read_manifest(path, step)
    check_files(path, manifest)
    return manifest


def check_files(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Raise IndexVersionError unless the local folder holds exactly the manifest's files, undamaged.

    Each file must have its checksum.
    """
    different = sorted(set(manifest["sha256"]) ^ set(file_names(path)))
    if different:
        raise IndexVersionError(f"{path}: files missing or not in the manifest: {', '.join(different)}")
    check_hashes(path, manifest)


def check_hashes(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Raise IndexVersionError unless each of the manifest's files has its checksum.

    `path` may be in a bucket.
    """
    for name, expected in manifest["sha256"].items():
        try:
            digest = file_sha256(path / name)
        except FileNotFoundError:
            raise IndexVersionError(f"{path / name}: missing; rebuild the index") from None
        if digest != expected:
            raise IndexVersionError(f"{path / name}: does not match its checksum; rebuild the index")


def file_names(path: epath.Path) -> list[str]:
    """All files under a local folder but the manifest, relative to it."""
    names = [
        (folder / name).relative_to(path).as_posix() for folder, _, files in path.walk() for name in files
    ]
    return sorted(set(names) - {MANIFEST})


def read_chunks(path: epath.Path) -> Iterator[bytes]:
    """The bytes of a local file or of one in a bucket."""
    with path.open("rb") as opened:
        # epath's types do not distinguish text from bytes.
        file = cast(BinaryIO, opened)
        while chunk := file.read(READ_BYTES):
            yield chunk


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of a manifest, without that field."""
    fields = {field: value for field, value in manifest.items() if field != "manifest_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
