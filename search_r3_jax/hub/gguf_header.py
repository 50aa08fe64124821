"""Header of a GGUF file; every count and offset is checked against the file's size."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.errors import UserError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS, _ALIGNMENT = 4, 32


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Storage of a tensor: `shape` in torch order, `kind` its storage type, `offset` in the data section."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Metadata fields (numbers, strings, lists of them), tensors by name, and the offset of their data."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int


def read_header(path: Path, data: np.ndarray) -> GgufHeader:
    """The header of a GGUF file; raises UserError naming what does not fit the file."""
    try:
        return _read(_Cursor(data))
    except _HeaderError as damage:
        raise UserError(f"{path}: not a readable GGUF file ({damage}); download it again") from None


class _HeaderError(Exception):
    """What is wrong with the header."""


class _Cursor:
    """Reads values in order, never past the end."""

    def __init__(self, data: np.ndarray):
        self._data = data
        self.at = 0

    @property
    def left(self) -> int:
        return self._data.size - self.at

    def take(self, count: int) -> np.ndarray:
        if count > self.left:
            raise _HeaderError(f"it ends at byte {self._data.size}, within its header")
        self.at += count
        return self._data[self.at - count : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size).tobytes(), "little")

    def text(self) -> str:
        try:
            return self.take(self.unsigned(8)).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise _HeaderError(f"a text before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.unsigned(4), self.unsigned(8)
            if kind == _STRING:
                # A count beyond the file ends where the file does.
                return [self.text() for _ in range(count)]
            if kind not in _SCALARS:
                raise _HeaderError(f"a list of values of type {kind}")
            return self.take(count * _SCALARS[kind].itemsize).view(_SCALARS[kind]).tolist()
        if kind not in _SCALARS:
            raise _HeaderError(f"a value of type {kind}")
        return self.take(_SCALARS[kind].itemsize).view(_SCALARS[kind]).tolist()[0]


def _read(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4).tobytes() != _MAGIC:
        raise _HeaderError("it does not begin with 'GGUF'")
    version = cursor.unsigned(4)
    if version not in _VERSIONS:
        raise _HeaderError(f"version {version}; versions 2 and 3, little-endian, are read")
    tensor_count, field_count = cursor.unsigned(8), cursor.unsigned(8)
    fields: dict[str, Any] = {}
    # No count is trusted with memory: each turn reads bytes, so the file's end bounds the loop.
    for _ in range(min(field_count, cursor.left)):
        key = cursor.text()
        if key in fields:
            raise _HeaderError(f"the field {key!r} is there twice")
        fields[key] = cursor.value(cursor.unsigned(4))
    tensors: dict[str, GgufTensor] = {}
    for _ in range(min(tensor_count, cursor.left)):
        tensor = _read_tensor(cursor)
        if tensor.name in tensors:
            raise _HeaderError(f"the tensor {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    if len(fields) != field_count or len(tensors) != tensor_count:
        raise _HeaderError(
            f"it promises {field_count} fields and {tensor_count} tensors, more than fit into it"
        )
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _HeaderError(f"general.alignment is {alignment!r}, not a power of two")
    return GgufHeader(fields=fields, tensors=tensors, data_start=-(-cursor.at // alignment) * alignment)


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.text()
    dimensions = cursor.unsigned(4)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _HeaderError(f"the tensor {name!r} has {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions).tobytes())
    if math.prod(shape) == 0:
        raise _HeaderError(f"the tensor {name!r} is empty")
    return GgufTensor(
        name=name, shape=tuple(reversed(shape)), kind=cursor.unsigned(4), offset=cursor.unsigned(8)
    )
