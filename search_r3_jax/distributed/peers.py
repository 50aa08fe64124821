"""The other processes of a cluster: each says how it ends, and none waits for one that is gone."""

from __future__ import annotations

import atexit
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from search_r3_jax.console import show_mistake
from search_r3_jax.errors import TRY_AGAIN, USER_STATUS, UserError

# JAX takes a process without heartbeat for this long as dead and ends the others: the only signal when a
# whole machine is lost.
SILENT_SECONDS = 60
# What a process says before it ends: that it is done, that it met a user's mistake, that another is gone.
DONE, MISTAKE, GONE = b"done", b"user", b"gone"
# A mistake that all processes meet is reported by each; one that does not meet it ends after so long.
MISTAKE_SECONDS = 5.0
# The death of another process is heard of within so long after an error that it causes.
BLAME_SECONDS = 2.0
# Process 0 ends after the others, but waits no longer than this.
LAST_SECONDS = 10.0
# Waits until the process that started it is gone, and three seconds more.
KEEPER = ("/bin/sh", "-c", "read line; exec sleep 3")
DESCRIPTORS = Path("/proc/self/fd")


class Peers:
    """The other processes: process 0 watches all, the others watch process 0.

    This one exits with `TRY_AGAIN` soon after another has died, and with `USER_STATUS` soon after another has
    met a user's mistake. Raises UserError where process 0, at `host`, is not reached.
    """

    def __init__(self, host: str):
        # JAX no longer knows it when the interpreter ends, which one that meets an error may do first.
        self._process = jax.process_index()
        self._connections = _connections(host)
        self._keeper = _keep_open(self._connections) if self._process == 0 else None
        self._lock, self._ends = threading.Lock(), False
        self._watchers = [
            threading.Thread(target=self._watch, args=(number,), daemon=True) for number in self._connections
        ]
        for watcher in self._watchers:
            watcher.start()

    def part(self) -> None:
        """Leave the cluster when all are done; process 0, whose service the others need, is the last.

        JAX alone stops the service while calls of the others are on their way, and may abort over one.
        """
        _say(DONE, self._connections)
        for watcher in self._watchers:
            watcher.join()
        service, distributed.global_state.service = distributed.global_state.service, None
        jax.distributed.shutdown()
        if service is not None:
            for connection in self._connections.values():
                connection.settimeout(LAST_SECONDS)
                # One that is slower is not waited for.
                with suppress(OSError):
                    connection.recv(1)
            service.shutdown()
        for connection in self._connections.values():
            connection.close()
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()

    def leave(self, error: UserError) -> NoReturn:
        """End this process after a user's mistake, and so the others.

        At a normal exit JAX waits for the others, which may wait for this one in a collective.
        """
        # Its output may be gone, or on a full disk.
        with suppress(OSError, ValueError):
            show_mistake(error)
        self._end_alone(MISTAKE)
        self._exit(USER_STATUS)

    def fail(self, status: int) -> None:
        """Let the others end after an error, and the interpreter end with `status` without them."""
        self._end_alone(MISTAKE if status == USER_STATUS else GONE)
        # Before JAX's, which was registered earlier.
        atexit.register(self._exit, status)

    def _end_alone(self, word: bytes) -> None:
        """Tell the others, unless this process ends because another is gone.

        The error may come of that: a collective fails, or a file cannot be written.
        """
        time.sleep(BLAME_SECONDS)
        if not self._is_first_reason():
            # A watcher ends this process.
            threading.Event().wait(2 * LAST_SECONDS)
        _say(word, self._connections)

    def _is_first_reason(self) -> bool:
        """Whether this process has had no reason to end before; it has one now."""
        with self._lock:
            ended, self._ends = self._ends, True
        return not ended

    def _watch(self, number: int) -> None:
        """Wait for what process `number` says last, and end this process unless that is `DONE`."""
        received = self._hear(number)
        if received == DONE:
            return
        if received == MISTAKE:
            # Mostly all meet the same mistake; each says so itself, and ends.
            time.sleep(MISTAKE_SECONDS)
        if not self._is_first_reason():
            # Process 0 waits until the others are gone.
            while self._hear(number):
                pass
            return
        who, why, then = f"process {number}", "is gone", "The same command, on all processes, goes on"
        status, word = TRY_AGAIN, GONE
        if received == MISTAKE:
            status, word, why, then = USER_STATUS, MISTAKE, "met a mistake", "Its output says which"
        elif received == GONE:
            who = "another process"
        # Process 0 alone hears of it.
        _say(word, {other: each for other, each in self._connections.items() if other != number})
        # Not an exception: the main thread may wait for ever in a collective with the dead process.
        message = f"search-r3: {who} {why}; process {self._process} stops too. {then}\n"
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), message.encode())
        self._exit(status)

    def _hear(self, number: int) -> bytes:
        """The next word of process `number`; nothing when it is gone."""
        try:
            return self._connections[number].recv(len(DONE), socket.MSG_WAITALL)
        except OSError:
            return b""

    def _exit(self, status: int) -> NoReturn:
        """End this process; process 0 after the others, for XLA aborts a process that loses the service."""
        if self._process == 0:
            end = time.monotonic() + LAST_SECONDS
            for watcher in self._watchers:
                if watcher is not threading.current_thread():
                    watcher.join(max(0.0, end - time.monotonic()))
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


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


def _keep_open(connections: Mapping[int, socket.socket]) -> subprocess.Popen[bytes] | None:
    """A process that holds the sockets of this one, but for `connections`, a little longer than it lives.

    XLA aborts a process whose connection to process 0 closes. So each hears by ours first, and says why it
    ends. None where the system does not list a process' files, or has no shell.
    """
    if not DESCRIPTORS.is_dir():
        return None
    ours = {connection.fileno() for connection in connections.values()}
    kept = [int(entry.name) for entry in DESCRIPTORS.iterdir() if _is_open_socket(int(entry.name))]
    # Without a shell, or where a socket closed just now, the processes may end with an abort of XLA's.
    with suppress(OSError):
        return subprocess.Popen(
            KEEPER,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[descriptor for descriptor in kept if descriptor not in ours],
            # Ctrl-C reaches all processes of a terminal.
            start_new_session=True,
        )
    return None


def _is_open_socket(descriptor: int) -> bool:
    """Whether it is a socket, and not one that waits for connections, whose port must become free."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        duplicate = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False
    with duplicate:
        return not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _say(word: bytes, connections: Mapping[int, socket.socket]) -> None:
    """Tell the other processes how this one ends."""
    for connection in connections.values():
        # The other process may already have ended.
        with suppress(OSError):
            connection.sendall(word)
