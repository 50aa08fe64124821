"""Atomic file writes, file locks, content hashes and line-by-line reading of texts. Imports no jax."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TextIO

import numpy as np

from search_r3_jax.errors import UserError

READ_BYTES = 1 << 22


class PathLike(Protocol):
    """What can be opened: a `Path`, or one of `etils.epath` in a bucket."""

    def open(self, mode: Literal["rb"]) -> Any:
        """A file object that reads bytes."""
        ...


def target_of(path: Path) -> Path:
    """The path behind symbolic links, whether or not it exists."""
    return Path(os.path.realpath(path))


def is_written_in_place(path: Path) -> bool:
    """Whether `path` takes bytes but no other file in its place.

    So do devices, pipes, the open files of this process, and files in folders that cannot be written.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(kind):
        return not stat.S_ISDIR(kind)
    return _descriptor_of(path) is not None or not os.access(target_of(path).parent, os.W_OK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes that of `path` when the block ends without an error.

    A reader of `path` sees the old file or the new one, never a part; of a symbolic link the target is
    replaced. What takes no other file in its place gets the bytes (`is_written_in_place`). The temporary file
    is always removed.
    """
    if is_written_in_place(path):
        with tempfile.TemporaryDirectory(prefix="search-r3-") as folder:
            temporary = Path(folder) / "output"
            yield temporary
            with temporary.open("rb") as written, _opened_in_place(path) as file:
                shutil.copyfileobj(written, file)
        return
    target = target_of(path)
    # Shortened, because a name may already be as long as a file system takes.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")
    try:
        yield temporary
        if target.is_file():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _descriptor_of(path: Path) -> int | None:
    """The descriptor of this process that `path` names, or that standard output or error has open."""
    named = re.fullmatch(r"/(?:dev|proc/self)/fd/([0-9]{1,9})", str(path))
    for number in (*((int(named[1]),) if named else ()), 1, 2):
        try:
            if os.path.samestat(path.stat(), os.fstat(number)):
                return number
        except OSError:
            continue
    return None


def _opened_in_place(path: Path) -> BinaryIO:
    number = _descriptor_of(path)
    if number is None:
        return path.open("wb")
    # Opened by its name again, a file would be written from its beginning, over what is printed.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return os.fdopen(os.dup(number), "wb")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically; raises UserError when the file cannot be written."""
    try:
        with replacing(path) as temporary:
            save_array(temporary, array)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another --out"
        ) from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file under exactly this name, which NumPy would end in .npy."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def hold_lock(file: Path) -> TextIO | None:
    """Open a file under an exclusive lock, or return None while another process holds it.

    The lock ends when the file is closed or the process ends, for whatever reason.
    """
    lock = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def append_line(file: Path, line: str, *, durable: bool = False) -> None:
    """Append one line; with `durable`, return only after it is on the disk (fsync)."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")
        if durable:
            opened.flush()
            os.fsync(opened.fileno())


def complete_lines(file: Path) -> list[str]:
    """The lines of an append-only file without a truncated last one; [] when the file is missing."""
    if not file.is_file():
        return []
    return file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def file_sha256(path: PathLike) -> str:
    """Hexadecimal sha256 of a file's bytes, wherever it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(strings: Iterable[str]) -> str:
    """Hexadecimal sha256 of a sequence of strings, each preceded by its UTF-8 length (8 bytes)."""
    digest = hashlib.sha256()
    for string in strings:
        encoded = string.encode()
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, or the `text` fields of a .jsonl file.

    Raises UserError naming file and line.
    """
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
        entry = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); a .jsonl file holds one object a line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise UserError(f"{where}: text: missing or no string; each line is an object with a 'text'")
    return entry["text"]
