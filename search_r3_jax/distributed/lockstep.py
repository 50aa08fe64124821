"""Lockstep of several processes: process 0 decides, the others take part in the device programs it runs.

What a process reads from a file, a clock or a float of its own may differ elsewhere. Where such a value
decides on shapes, branches, saves or stops, one process must decide for all, or they wait for each other for
ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.errors import EmbeddingError, StoppedError, TransientError, UserError

R = TypeVar("R")
Message = Mapping[str, Any]
"""Arrays, and values of JSON, by name."""

# A message that fits in so many bytes is sent at once; a longer one in two broadcasts.
FIRST_BYTES = 1024
_LENGTH_BYTES = 8
_RESULT, _ERROR, _CALL = "result", "error", "call"


class Team:
    """The processes of a run. Each makes one, and calls the same methods in the same order."""

    def __init__(self) -> None:
        self._calls: dict[str, Callable[..., Any]] = {}
        self._leading = False

    def lead(self, work: Callable[[], Message]) -> Message:
        """What `work` returns in process 0; it runs there alone, and every process gets its message.

        The others meanwhile run what `work` calls of `together`. A UserError, a TransientError or a
        StoppedError of `work` is raised in all processes.
        """
        if jax.process_count() == 1 or self._leading:
            return work()
        if not is_first():
            return self._serve()
        self._leading = True
        try:
            message = _packed(_RESULT, work())
        except (UserError, TransientError, StoppedError) as error:
            _broadcast(_packed(_ERROR, _error_message(error)))
            raise
        finally:
            self._leading = False
        _broadcast(message)
        return _unpacked(message)[1]

    def together(self, name: str, call: Callable[..., R]) -> Callable[..., R]:
        """`call`, which every process runs when process 0 does so within `lead`.

        Its arguments are arrays. Outside of `lead` all processes call it themselves. Of two under one `name`
        the later counts.
        """
        self._calls[name] = call

        def called(*arrays: np.ndarray) -> R:
            if not self._leading:
                return call(*arrays)
            _broadcast(_packed(_CALL, {"call": name, **{str(i): array for i, array in enumerate(arrays)}}))
            self._leading = False
            try:
                return call(*arrays)
            finally:
                self._leading = True

        return called

    def forget(self, name: str) -> None:
        """Drop the call of this name."""
        del self._calls[name]

    def require_same(self, field: str, value: Any) -> None:
        """Raise UserError in all processes where the value, which is JSON, differs from that of process 0."""
        for _, process in _differing({field: value}):
            raise UserError(
                f"{field}: process {process} has other content than process 0; give all the same files"
            )

    def require_same_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError in all processes, naming a setting that differs from that of process 0."""
        for name, process in _differing(settings):
            raise UserError(
                f"{name}: process {process} has another value than process 0; give all the same settings"
            )

    def _serve(self) -> Message:
        """Run what process 0 asks for, until it sends its result; raises its error."""
        failed: EmbeddingError | None = None
        while True:
            kind, message = _unpacked(_received())
            if kind == _RESULT:
                if failed is not None:
                    raise failed
                return message
            if kind == _ERROR:
                raise _error_of(message)
            arguments = [message[str(i)] for i in range(len(message) - 1)]
            try:
                self._calls[message["call"]](*arguments)
            except EmbeddingError as error:
                # Vectors are the same everywhere: process 0 met it too, and says what becomes of it.
                # Any other error ends this process, and so the others.
                failed = error


def _differing(values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The names whose values, which are JSON, differ from those of process 0, and in which process."""
    if jax.process_count() == 1:
        return []
    mine = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    digests = np.asarray(multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint8)))
    each = digests.reshape(len(digests), len(mine), -1)
    differs = (each != each[0]).any(axis=2)
    return [(name, int(np.argmax(differs[:, at]))) for at, name in enumerate(values) if differs[:, at].any()]


def _error_message(error: UserError | TransientError | StoppedError) -> Message:
    if isinstance(error, UserError):
        return {"line": error.line, "table": list(error.table)}
    if isinstance(error, TransientError):
        return {"passes": str(error)}
    return {"stopped": str(error)}


def _error_of(message: Message) -> UserError | TransientError | StoppedError:
    if "passes" in message:
        return TransientError(message["passes"])
    if "stopped" in message:
        return StoppedError(message["stopped"])
    return UserError(message["line"], table=message["table"])


def _packed(kind: str, message: Message) -> bytes:
    arrays = {
        name: np.ascontiguousarray(value) for name, value in message.items() if isinstance(value, np.ndarray)
    }
    # Made contiguous, an array without dimensions would have one.
    shapes = {name: [array.dtype.name, list(message[name].shape)] for name, array in arrays.items()}
    values = {name: value for name, value in message.items() if name not in arrays}
    head = json.dumps({"kind": kind, "arrays": shapes, "values": values}).encode()
    return b"".join(
        [len(head).to_bytes(_LENGTH_BYTES, "big"), head, *(array.tobytes() for array in arrays.values())]
    )


def _unpacked(data: bytes) -> tuple[str, dict[str, Any]]:
    at = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    head = json.loads(data[_LENGTH_BYTES:at])
    message: dict[str, Any] = head["values"]
    for name, (dtype_name, shape) in head["arrays"].items():
        dtype = jnp.dtype(dtype_name)
        count = int(np.prod(shape, dtype=np.int64))
        # A copy: an array over bytes cannot be written to.
        message[name] = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    return head["kind"], message


def _broadcast(data: bytes) -> None:
    """Send bytes from process 0 to all."""
    data = len(data).to_bytes(_LENGTH_BYTES, "big") + data
    _sent(np.frombuffer(data[:FIRST_BYTES].ljust(FIRST_BYTES, b"\0"), np.uint8))
    if rest := data[FIRST_BYTES:]:
        # One program for each power of two, not for each length.
        _sent(np.frombuffer(rest.ljust(_power_of_two(len(rest)), b"\0"), np.uint8))


def _received() -> bytes:
    """What process 0 broadcasts next."""
    first = _sent(np.zeros(FIRST_BYTES, np.uint8)).tobytes()
    length = int.from_bytes(first[:_LENGTH_BYTES], "big")
    data = first[_LENGTH_BYTES : _LENGTH_BYTES + length]
    left = length - len(data)
    return data + _sent(np.zeros(_power_of_two(left), np.uint8)).tobytes()[:left] if left else data


def _sent(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array), np.uint8)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
