"""Atomic replacement of folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from search_r3_jax.errors import UserError
from search_r3_jax.outputs import check_not_mounted, check_output_folder


@contextmanager
def replaced_folder(out: Path, *, marker: str, size: int = 0) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` when the block ends; an error leaves `out` unchanged.

    `out` may be missing, empty, or hold a file named `marker`. Of a symbolic link the target is replaced.
    Raises UserError for any other `out`, when `size` bytes are not free, and when the disk refuses.
    """
    check_replaceable(out, marker=marker, size=size)
    target = out.resolve()
    temporary = _sibling(target, "tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out}: cannot be written ({' '.join(str(error).split())}); make room or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(out: Path, *, marker: str, size: int = 0) -> None:
    """Raise UserError for an `out` that `replaced_folder` does not replace, or that cannot be written."""
    target = out.resolve()
    if target.is_dir():
        if any(target.iterdir()) and not (target / marker).is_file():
            raise UserError(f"{out}: exists and is no export of ours; choose another --out")
        check_not_mounted("--out", out)
    elif target.exists():
        raise UserError(f"{out}: is a file; choose another --out")
    check_output_folder("--out", target.parent, size=size)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    # rename cannot replace a folder that is not empty: rename the old one first, and back if anything fails.
    aside = _sibling(target, "old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sibling(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")
