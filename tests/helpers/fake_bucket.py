"""An object store for tests, under gs://: whole objects in a dictionary, no folders and no rename, listings
that fsspec remembers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
import pytest
from etils.epath import backend
from fsspec.registry import _registry

BLOCK = 4096


class FakeBucket(fsspec.AbstractFileSystem):
    """What gcsfs shows of a bucket; `objects` is the bucket itself, which other processes change behind its
    back."""

    protocol = ("gs", "gcs")
    objects: ClassVar[dict[str, bytes]] = {}
    reads: ClassVar[list[str]] = []

    @staticmethod
    def before_write() -> None:
        """Hears of every write, to be patched."""

    @staticmethod
    def before_delete() -> None:
        """Hears of every deletion, to be patched."""

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = str(self._strip_protocol(path))
        found = self.dircache.get(path)
        if found is None:
            below = sorted(name for name in self.objects if name.startswith(f"{path}/"))
            if not below:
                raise FileNotFoundError(path)
            children = {"/".join(name.split("/")[: path.count("/") + 2]) for name in below}
            found = [self._entry(child) for child in sorted(children)]
            self.dircache[path] = found
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = str(self._strip_protocol(path))
        remembered = [entry for entry in self.dircache.get(self._parent(path), ()) if entry["name"] == path]
        if remembered:
            return remembered[0]
        if path not in self.objects and not any(name.startswith(f"{path}/") for name in self.objects):
            raise FileNotFoundError(path)
        return self._entry(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = str(self._strip_protocol(path))
        # In whatever order; a manifest comes last in this one.
        doomed = [
            name
            for name in sorted(self.objects, reverse=True)
            if name == path or (recursive and name.startswith(f"{path}/"))
        ]
        if not doomed:
            raise FileNotFoundError(path)
        for name in doomed:
            FakeBucket.before_delete()
            del self.objects[name]
        self.dircache.clear()

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """A bucket has no folders."""

    def mv(self, *_: Any, **__: Any) -> None:
        raise OSError("a bucket cannot rename")

    def cp_file(self, *_: Any, **__: Any) -> None:
        raise OSError("not what is tested")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if "w" in mode:
            return _Upload(self, path)
        size = self.info(path)["size"]
        self.reads.append(path)
        return io.BytesIO(self.objects[path][:size])

    def _entry(self, name: str) -> dict[str, Any]:
        is_object = name in self.objects
        return {
            "name": name,
            "size": len(self.objects[name]) if is_object else 0,
            "type": "file" if is_object else "directory",
        }


class _Upload(io.BytesIO):
    """Appears when it is closed; closed by an error, fsspec finishes what went up, which is whole blocks."""

    def __init__(self, bucket: FakeBucket, path: str) -> None:
        super().__init__()
        self._bucket, self._path, self._failed = bucket, path, False

    def write(self, data: Any) -> int:
        try:
            FakeBucket.before_write()
        except BaseException:
            self._failed = True
            raise
        return super().write(data)

    def close(self) -> None:
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        if self._failed:
            content = content[: len(content) // BLOCK * BLOCK]
            if not content:
                return
        FakeBucket.before_write()
        self._bucket.objects[self._path] = content
        self._bucket.dircache.clear()


@contextmanager
def fake_bucket() -> Iterator[type[FakeBucket]]:
    """An empty bucket behind every gs:// path."""
    with pytest.MonkeyPatch.context() as patched:
        for name in FakeBucket.protocol:
            patched.setitem(_registry, name, FakeBucket)
        patched.setattr(FakeBucket, "objects", {})
        patched.setattr(FakeBucket, "reads", [])
        forget()
        yield FakeBucket
    forget()


def forget() -> None:
    """What a new process knows of the bucket: nothing."""
    FakeBucket.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
