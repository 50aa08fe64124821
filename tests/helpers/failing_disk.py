"""A machine on which the n-th change of a file fails, on a local disk or in the fake bucket."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.fake_bucket import FakeBucket

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


class PowerCut(BaseException):
    """The process is gone: nothing that it does from here on has an effect."""


class _Watched:
    """A file whose writes are changes."""

    def __init__(self, file: Any, change: Callable[[], None]) -> None:
        self._file, self._change = file, change

    def write(self, data: Any) -> Any:
        self._change()
        return self._file.write(data)

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing(at: int, error: BaseException, *, writes_only: bool) -> Iterator[list[int]]:
    """The change numbered `at` and all after it raise `error`; the list says how many there were. Deleting
    may still work."""
    count = [0]

    def change() -> None:
        count[0] += 1
        if count[0] > at:
            raise error

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*arguments: Any, **options: Any) -> Any:
            change()
            return function(*arguments, **options)

        return guard

    def opening(original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return original(path, mode, *arguments, **options)
            change()
            return _Watched(original(path, mode, *arguments, **options), change)

        return watched

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builtins, "open", opening(builtins.open))
        patched.setattr(io, "open", opening(io.open))
        for name in ("mkdir", "rename", "replace"):
            patched.setattr(os, name, guarded(getattr(os, name)))
        patched.setattr(FakeBucket, "before_write", change)
        if not writes_only:
            for name in ("unlink", "remove", "rmdir"):
                patched.setattr(os, name, guarded(getattr(os, name)))
            patched.setattr(FakeBucket, "before_delete", change)
        yield count
