"""Checksums of a checkpoint, written before it is published and verified before it is restored."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from search_r3_jax.files import write_json

CHECKSUMS = "SEAL.json"
# Files that Orbax writes or rewrites after the checksums: times, and the published name of the folder.
METADATA, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
CHUNK_BYTES = 1 << 24


def write_checksums(folder: Path) -> None:
    """Write size and CRC-32 of every file of a folder that is about to be published."""
    write_json(
        folder / CHECKSUMS,
        {str(file.relative_to(folder)): [file.stat().st_size, _crc32(file)] for file in _files(folder)},
    )


def verify_checkpoint(folder: Path, part: str = "") -> str | None:
    """Describe the damage of a checkpoint folder, or of its subfolder `part`; None if it is intact.

    A folder without checksums counts as intact.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return None
    try:
        expected = json.loads(file.read_text(encoding="utf-8"))
        for name, (size, crc32) in expected.items():
            if part and Path(name).parts[0] != part:
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            # The size first: it is cheap to read.
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if _crc32(path) != crc32:
                return f"{name} has other bytes than were written"
        json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if not (folder / COMMITTED).read_text(encoding="utf-8").endswith(folder.name):
            return f"{COMMITTED} is cut off"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} or {METADATA} cannot be understood"
    return None


def _files(folder: Path) -> list[Path]:
    late = {folder / name for name in (CHECKSUMS, METADATA, COMMITTED)}
    return sorted(file for file in folder.rglob("*") if file.is_file() and file not in late)


def _crc32(file: Path) -> int:
    crc32 = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
