"""Atomic file writes, .jsonl files of our own, file locks and content hashes. Imports no jax."""

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

from search_r3_jax.errors import not_written

READ_BYTES = 1 << 22
# What str.splitlines and other tools end a line at, apart from what JSON escapes; and what UTF-8 cannot hold.
_SEPARATORS = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


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


def is_standard_output(path: Path) -> bool:
    """Whether `path` names what standard output has open, under whatever name."""
    try:
        return path.exists() and os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


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
    """Write a .npy file atomically; raises UserError or TransientError when it cannot be written."""
    try:
        with replacing(path) as temporary:
            save_array(temporary, array)
    except OSError as error:
        raise not_written(path, error, "make room or choose another --out") from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file under exactly this name, which NumPy would end in .npy."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def hold_lock(file: Path) -> TextIO | None:
    """Open a file under an exclusive lock, or return None while another process holds it.

    The lock ends when the file is closed or the process ends, for whatever reason. Raises OSError where files
    cannot be locked.
    """
    lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        lock.close()
        raise
    return lock


def json_line(record: Any) -> str:
    """A record as one line of a .jsonl file, which ends at "\\n" alone for every reader.

    Other characters that some readers end a line at, and halves of surrogate pairs, are escaped.
    """
    return _SEPARATORS.sub(
        lambda character: f"\\u{ord(character[0]):04x}", json.dumps(record, ensure_ascii=False)
    )


def write_json_lines(file: Path, records: Iterable[Any]) -> None:
    """Write a .jsonl file atomically, a record a line."""
    write_text(file, "".join(json_line(record) + "\n" for record in records))


def append_json_line(file: Path, record: Any, *, durable: bool = False) -> None:
    """Append a record to a .jsonl file; with `durable`, return only after it is on the disk (fsync)."""
    with file.open("ab") as opened:
        opened.write(json_line(record).encode() + b"\n")
        if durable:
            opened.flush()
            os.fsync(opened.fileno())


def read_json_lines(file: Path) -> list[Any]:
    """The records of a .jsonl file without an incomplete last line; [] when the file is missing.

    Raises ValueError for a line that is no JSON.
    """
    return [json.loads(line) for line in complete_lines(file)]


def complete_lines(file: Path) -> list[str]:
    """The lines of an append-only file without a truncated last one; [] when the file is missing."""
    if not file.is_file():
        return []
    # Bytes, because reading as text would end lines at "\r" too.
    return file.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]


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
        digest.update(framed(string))
    return digest.hexdigest()


def framed(string: str) -> bytes:
    """A string as `digest_of` takes it: its UTF-8 length, then its bytes."""
    encoded = string.encode()
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    return len(encoded).to_bytes(8, "big") + encoded
