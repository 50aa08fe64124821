"""Start of a JAX cluster of several processes, and a clean exit of all when one of them dies."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from search_r3_jax.console import show_mistake
from search_r3_jax.distributed.spec import Cluster, explicit_cluster, is_detectable
from search_r3_jax.errors import StoppedError, TransientError, UserError

# JAX takes a process without heartbeat for this long as dead and ends the others: the only signal when a
# whole machine is lost.
SILENT_SECONDS = 60
# Exit status of a process that stops because another has died; a launcher then restarts all.
STATUS = 75
# That of a user's mistake: started again, the command would fail again.
USER_STATUS = 2
# What a process says before it ends: that it is done, or that it met a user's mistake.
DONE, MISTAKE = b"done", b"user"
# Set when this process ends by a mistake of its own.
_ENDING = threading.Event()
# A mistake that all processes meet is reported by each; one that does not meet it ends after so long.
MISTAKE_SECONDS = 5.0


@contextmanager
def join_cluster(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the other processes, if there are any, before JAX is used.

    The cluster comes from flags, the environment, SLURM or a TPU's metadata. While the context is open, this
    process exits with `STATUS` soon after another has died, and with `USER_STATUS` soon after it or another
    has left with a UserError. Raises UserError for incomplete settings, and TransientError where the
    processes do not find each other.
    """
    named = explicit_cluster(cluster, environment)
    try:
        if named is not None:
            jax.distributed.initialize(
                named.coordinator, named.processes, named.process, heartbeat_timeout_seconds=SILENT_SECONDS
            )
        elif is_detectable(environment):
            jax.distributed.initialize(heartbeat_timeout_seconds=SILENT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise TransientError(
            f"cluster: the processes did not find each other ({' '.join(str(error).split())[:300]})"
        ) from error
    host = _local_address() if named is None else named.coordinator.rsplit(":", 1)[0]
    connections = _connections(host) if jax.process_count() > 1 else {}
    watchers = [
        threading.Thread(target=_exit_when_lost, args=(number, connections), daemon=True)
        for number in connections
    ]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    except StoppedError:
        _say(DONE, connections)
        raise
    except UserError as error:
        if not connections:
            raise
        _leave(error, connections, watchers)
    _say(DONE, connections)


def is_first() -> bool:
    """Whether this is the process that writes shared files."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process has reached the barrier `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _connections(host: str) -> dict[int, socket.socket]:
    """One socket between process 0, at `host`, and each other process, by process number.

    The operating system closes a socket when its process dies, for whatever reason.
    """
    process, count = jax.process_index(), jax.process_count()
    with socket.create_server(("", 0)) if process == 0 else socket.socket() as server:
        message = np.zeros(300, np.uint8)
        if process == 0:
            text = f"{server.getsockname()[1]} {host}".encode()
            message[: len(text)] = np.frombuffer(text, np.uint8)
        address = (
            np.asarray(multihost_utils.broadcast_one_to_all(message), np.uint8)
            .tobytes()
            .rstrip(b"\0")
            .decode()
        )
        port, host = address.split(" ")
        try:
            if process:
                connection = socket.create_connection((host, int(port)), timeout=SILENT_SECONDS)
                connection.sendall(process.to_bytes(4, "big"))
                connection.settimeout(None)
                return {0: connection}
            server.settimeout(SILENT_SECONDS)
            accepted = [server.accept()[0] for _ in range(count - 1)]
            return {
                int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big"): connection
                for connection in accepted
            }
        except OSError as error:
            raise UserError(
                f"cluster: process 0 at {host}, port {port}: not all others reach it ({error}); let them "
                "through"
            ) from error


def _say(word: bytes, connections: Mapping[int, socket.socket]) -> None:
    """Tell the other processes how this one ends."""
    for connection in connections.values():
        # The other process may already have ended.
        with suppress(OSError):
            connection.sendall(word)


def _leave(
    error: UserError, connections: Mapping[int, socket.socket], watchers: Sequence[threading.Thread]
) -> NoReturn:
    """End this process after a UserError, and so the others.

    At a normal exit JAX waits for the others, which may wait for this one in a collective.
    """
    _ENDING.set()
    _say(MISTAKE, connections)
    show_mistake(error)
    if is_first():
        # The others need process 0's service until they have ended.
        end = time.monotonic() + 2 * MISTAKE_SECONDS
        for watcher in watchers:
            watcher.join(max(0.0, end - time.monotonic()))
    os._exit(USER_STATUS)


def _exit_when_lost(number: int, connections: Mapping[int, socket.socket]) -> None:
    """Wait for what process `number` says last, and end this process unless that is `DONE`."""
    try:
        received = connections[number].recv(len(DONE), socket.MSG_WAITALL)
    except OSError:
        received = b""
    if received == DONE or _ENDING.is_set():
        return
    status, why, then = STATUS, "is gone", "The same command, on all processes, goes on"
    if received == MISTAKE:
        # Mostly all meet the same mistake; each says so itself, and ends.
        time.sleep(MISTAKE_SECONDS)
        if _ENDING.is_set():
            return
        status, why, then = USER_STATUS, "met a mistake", "Its output says which"
        # Process 0 alone hears of it.
        _say(MISTAKE, {other: each for other, each in connections.items() if other != number})
    # Not an exception: the main thread may wait for ever in a collective with the dead process.
    message = f"search-r3: process {number} {why}; process {jax.process_index()} stops too. {then}\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(status)


def _local_address() -> str:
    """This machine's address as others reach it."""
    try:
        # Sends nothing: it only asks which interface a packet would leave by.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"
