"""Several processes as one JAX cluster: how they find each other, and what becomes of the others when one of
them dies."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import jax
import numpy as np
from jax.experimental import multihost_utils

from search_r3_jax.distributed.spec import Cluster, is_detectable, named_cluster
from search_r3_jax.errors import StoppedError, UserError

# A process that says nothing for so long is dead to JAX, which then ends the others: what is left when a
# whole machine is gone.
SILENT_SECONDS = 60
# Exit status of a process that stops because another has died; a launcher starts all of them again.
STATUS = 75
DONE = b"done"


@contextmanager
def in_cluster(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the other processes, if there are any, before JAX is used: by flags, by environment, as SLURM or a
    TPU's metadata say.

    Meanwhile this process ends with a line and `STATUS` soon after another has died, or has left by an error.
    Raises UserError for settings that are not whole.
    """
    named = named_cluster(cluster, environment)
    try:
        if named is not None:
            jax.distributed.initialize(
                named.coordinator, named.processes, named.process, heartbeat_timeout_seconds=SILENT_SECONDS
            )
        elif is_detectable(environment):
            jax.distributed.initialize(heartbeat_timeout_seconds=SILENT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster: the processes did not find each other ({' '.join(str(error).split())[:300]})"
        ) from error
    host = _own_address() if named is None else named.coordinator.rsplit(":", 1)[0]
    connections = _connections(host) if jax.process_count() > 1 else {}
    for number, connection in connections.items():
        threading.Thread(target=_end_with, args=(number, connection), daemon=True).start()
    try:
        yield
    except StoppedError:
        _say_done(connections)
        raise
    _say_done(connections)


def is_first() -> bool:
    """Whether this process writes what belongs to all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Until every process has come to `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _connections(host: str) -> dict[int, socket.socket]:
    """One between process 0, at `host` there, and each other: the system closes it when a process dies,
    however that goes."""
    own, count = jax.process_index(), jax.process_count()
    with socket.create_server(("", 0)) if own == 0 else socket.socket() as server:
        told = np.zeros(300, np.uint8)
        if own == 0:
            text = f"{server.getsockname()[1]} {host}".encode()
            told[: len(text)] = np.frombuffer(text, np.uint8)
        address = (
            np.asarray(multihost_utils.broadcast_one_to_all(told), np.uint8).tobytes().rstrip(b"\0").decode()
        )
        port, host = address.split(" ")
        try:
            if own:
                connection = socket.create_connection((host, int(port)), timeout=SILENT_SECONDS)
                connection.sendall(own.to_bytes(4, "big"))
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


def _say_done(connections: Mapping[int, socket.socket]) -> None:
    """That this process ends now is no reason for the others to stop."""
    for connection in connections.values():
        # The other may have ended before.
        with suppress(OSError):
            connection.sendall(DONE)


def _end_with(number: int, connection: socket.socket) -> None:
    try:
        heard = connection.recv(len(DONE))
    except OSError:
        heard = b""
    if heard == DONE:
        return
    # Not an exception: the main thread may be waiting for the dead process within a collective, for ever.
    message = (
        f"search-r3: process {number} is gone; process {jax.process_index()} stops too. The same "
        "command, on all processes, goes on\n"
    )
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(STATUS)


def _own_address() -> str:
    """This machine's address as others reach it."""
    try:
        # Sends nothing: it only asks which interface a packet would leave by.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"
