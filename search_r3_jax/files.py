"""Atomic writes of files, locks, and texts read line by line. Imports no jax."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from search_r3_jax.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of what is no text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file at once or not at all; raises UserError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def hold_lock(file: Path) -> TextIO | None:
    """An opened file that only one process holds, until it is closed or the process ends, however that goes;
    None while another does."""
    lock = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def append_line(file: Path, line: str, *, durable: bool = False) -> None:
    """Append one line; with `durable` it is on the disk when this returns, whatever happens to the
    machine."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")
        if durable:
            opened.flush()
            os.fsync(opened.fileno())


def complete_lines(file: Path) -> list[str]:
    """The lines of a file that only grows, without a last one that was cut off; [] where there is no file."""
    if not file.is_file():
        return []
    return file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def check_output(flag: str, path: Path | None) -> None:
    """Raise UserError, before any work, for a file that could not be written; `flag` is what named it."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{flag}: {path.parent}: no such folder; make it first")
    if path is not None and path.is_dir():
        raise UserError(f"{flag}: {path}: is a folder; name a file")


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, or each line's `text` where the name ends in .jsonl; raises UserError naming
    file and line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a text file or a .jsonl file"
        ) from None
    if lines[-1] == b"":
        lines.pop()
    return [
        _text_of(line, f"{path}: line {number}", path.suffix == ".jsonl")
        for number, line in enumerate(lines, start=1)
    ]


def _text_of(line: bytes, where: str, is_json: bool) -> str:
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from None
    if not is_json:
        return text
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); a .jsonl file holds one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{where}: text: missing or no string; each line is an object with a 'text'")
    return record["text"]
