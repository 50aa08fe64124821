"""Outputs of commands: checked before the work, and kept elsewhere when their place refuses them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from search_r3_jax.errors import UserError
from search_r3_jax.files import is_standard_output, is_written_in_place, replacing, target_of

# Enough to see that a disk is full: a file without content needs no block.
PROBE_BYTES = 4096
# Files of models, runs and data sets, and folders in them of which everything is read.
_INPUT_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "search_r3.json", "*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"),
    *("corpus.jsonl*", "queries.jsonl*", "dataset_info.json", "features.json", "*.array_record*"),
    *("metrics.jsonl", "samples.jsonl"),
)
_INPUT_FOLDERS = frozenset({"checkpoints", "snapshots", "index", "qrels", "neg"})


def check_outputs(*outputs: tuple[str, Path | None], inputs: Sequence[Path | str | None] = ()) -> None:
    """Raise UserError, before any work, if one of the files, each with its flag, cannot be written.

    Also when two of them are one file, and when one would replace what the command reads: one of `inputs`, or
    a file of such a folder. A name that is no path, such as of a model, is no input.
    """
    flag_of: dict[Path, str] = {}
    for flag, path in outputs:
        if path is None:
            continue
        check_output(flag, path)
        if path.exists() and is_written_in_place(path):
            continue
        for source in inputs:
            if source is not None and path.is_file() and _is_read(path, Path(source)):
                raise UserError(f"{flag}: {path}: is read by this command; name another file")
        if (other := flag_of.setdefault(target_of(path), flag)) != flag:
            raise UserError(f"{flag}: {path}: is {other} too; name another file")


def _is_read(path: Path, source: Path) -> bool:
    """Whether an existing file is `source`, or one that readers of the folder `source` look for."""
    if source.is_file():
        return path.samefile(source)
    target, folder = path.resolve(), source.resolve()
    if not (source.is_dir() and target.is_relative_to(folder)):
        return False
    *within, name = target.relative_to(folder).parts
    return not _INPUT_FOLDERS.isdisjoint(within) or any(fnmatch(name, pattern) for pattern in _INPUT_FILES)


def check_output(flag: str, path: Path | None, *, size: int = PROBE_BYTES) -> None:
    """Raise UserError, before any work, if the output file that `flag` names cannot be written.

    `size` is the least number of bytes that it will have.
    """
    if path is None:
        return
    with _refused(flag, path):
        if path.is_dir():
            raise UserError(f"{flag}: {path}: is a folder; name a file")
        folder = target_of(path).parent if path.is_symlink() else path.parent
        if is_written_in_place(path):
            kind = path.stat().st_mode
            if stat.S_ISSOCK(kind) or stat.S_ISBLK(kind):
                raise UserError(f"{flag}: {path}: is a socket or a disk; name a file, a pipe or a terminal")
            if not os.access(path, os.W_OK):
                raise PermissionError(0, "Permission denied")
            return
        if not folder.is_dir():
            raise UserError(f"{flag}: {folder}: no such folder; make it first")
        _probe(flag, path, folder, size)


def check_output_folder(flag: str, folder: Path | None, *, size: int = PROBE_BYTES) -> None:
    """Raise UserError, before any work, if the output folder that `flag` names cannot be made or written.

    `size` is the least number of bytes that it will hold.
    """
    if folder is None:
        return
    with _refused(flag, folder):
        there = target_of(folder)
        while not (there.exists() or there.is_symlink()):
            there = there.parent
        if not there.is_dir():
            raise UserError(f"{flag}: {there}: is a file; name a folder")
        _probe(flag, folder, there, size)


def check_not_mounted(flag: str, folder: Path) -> None:
    """Raise UserError for a folder where a disk is mounted: no finished folder can be renamed to it."""
    if os.path.ismount(folder):
        raise UserError(f"{flag}: {folder}: is where a disk is mounted; name a folder in it")


def write_result(flag: str, path: Path, write: Callable[[Path], object], *, text: str | None = None) -> None:
    """Write a result that took work with `write`, atomically.

    Where `path` refuses it, keep it in another folder, or print its `text`, and raise UserError that says so.
    """
    try:
        with replacing(path) as temporary:
            write(temporary)
    except OSError as error:
        kept = _keep_elsewhere(path.name, write)
        if kept is None and text is not None:
            print(text)
        result = "is on standard output" if text is not None else "is lost: no other folder takes it either"
        if kept is not None:
            result = f"is in {kept}"
        raise UserError(
            f"{flag}: {path}: cannot be written ({error.strerror or error}); the result {result}"
        ) from error


def write_json_result(flag: str, path: Path, value: Any) -> None:
    """Write a result as indented JSON, as `write_result` does."""
    write_text_result(flag, path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text_result(flag: str, path: Path, text: str) -> None:
    """Write a result as UTF-8, as `write_result` does."""
    # Names of files may hold bytes that are no text.
    content = text.encode("utf-8", "backslashreplace")
    write_result(flag, path, lambda file: file.write_bytes(content), text=text)


def write_all(*writes: Callable[[], object]) -> None:
    """Call all of `writes`, also behind one that fails; raises one UserError of all that were raised."""
    errors: list[UserError] = []
    for write in writes:
        try:
            write()
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError("; ".join(map(str, errors))) from errors[0]


def message_stream(*outputs: Path | None) -> TextIO:
    """Where to print for people: standard error where an output is standard output itself."""
    return (
        sys.stderr if any(path is not None and is_standard_output(path) for path in outputs) else sys.stdout
    )


@contextlib.contextmanager
def _refused(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{flag}: {path}: cannot be written ({error.strerror or error}); make room or choose another"
        ) from None


def _probe(flag: str, path: Path, folder: Path, size: int) -> None:
    """Write and remove a small file, because permissions alone say nothing of a full or read-only disk."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{flag}: {path}: needs {size:,} bytes, {free:,} are free; make room or choose another place"
        )
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".search-r3-") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
    with contextlib.suppress(FileNotFoundError):
        # A name can be too long for the file system.
        path.lstat()


def _keep_elsewhere(name: str, write: Callable[[Path], object]) -> Path | None:
    for parent in (tempfile.gettempdir, Path.cwd, Path.home):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="search-r3-", dir=parent()))
            write(folder / name)
        except (OSError, RuntimeError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        return folder / name
    return None
