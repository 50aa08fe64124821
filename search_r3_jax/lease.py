"""A lock with one holder at a time, which ends with its holder's process, or soon after its machine is gone.

On one machine, and over a file server that carries locks, the operating system tells who holds it. It cannot
tell of a machine that vanished: that one's lease expires when it has not been renewed for a while.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from search_r3_jax.errors import UserError
from search_r3_jax.files import hold_lock

logger = logging.getLogger(__name__)
# How often a lease is renewed, and how long another machine watches one that is not. No clocks are compared.
RENEW_SECONDS, EXPIRE_SECONDS = 10.0, 120.0
# Status of a process whose lease another has taken over: what it saved is there, and may be gone on with.
LOST_STATUS = 75
# Length of the file, and how often a lease that looks held is looked at before it counts as held.
LINE_BYTES = 512
GLANCES = 3
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says.

    Attributes:
      machine: one start of one machine, within which locks of files are known.
      host: the machine's name, for people.
      pid: the process.
      token: this lease, whoever else has the same process number.
      beat: counts how often it was renewed.
    """

    machine: str = ""
    host: str = "another machine"
    pid: int = 0
    token: str = ""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "a process of an older version"


class LeaseHeldError(Exception):
    """Another process holds the lease.

    Attributes:
      holder: that process.
    """

    def __init__(self, holder: Holder):
        super().__init__(str(holder))
        self.holder = holder


def this_machine() -> str:
    """A name of this start of this machine."""
    with suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return platform.node()


class LeaseWatch:
    """Looks at a lease from outside, now and then."""

    def __init__(self, file: Path, *, machine: str = "", expire_seconds: float = EXPIRE_SECONDS):
        self._file, self._machine = file, machine or this_machine()
        self._expire_seconds = expire_seconds
        self._seen: Holder | None = None
        self._since = time.monotonic()
        # Whether it was seen to change: then its holder is alive, wherever that is.
        self.alive = False
        # Who held it last, where that one's time has run out.
        self.expired: Holder | None = None

    def holder(self) -> Holder | None:
        """Who holds the lease; None when it is free, or expired."""
        found = _read(self._file)
        if found is None or found.machine == self._machine:
            # The operating system knows.
            lock = hold_lock(self._file) if self._file.exists() else None
            free = lock is not None or not self._file.exists()
            if lock is not None:
                lock.close()
            self.alive, self.expired = not free, None
            return None if free else found or Holder()
        if found != self._seen:
            self.alive = self._seen is not None and found.token == self._seen.token
            self._seen, self._since = found, time.monotonic()
        is_over = time.monotonic() - self._since > self._expire_seconds
        self.alive, self.expired = self.alive and not is_over, found if is_over else None
        return None if is_over else found


class Lease:
    """A lease that is held, and renewed by a thread."""

    def __init__(
        self,
        file: Path,
        lock: TextIO,
        holder: Holder,
        *,
        renew_seconds: float,
        expire_seconds: float,
        on_lost: Callable[[Path], object],
    ):
        self._file, self._lock, self._on_lost = file, lock, on_lost
        self._renew_seconds, self._expire_seconds = renew_seconds, expire_seconds
        self._holder, self._renewed = holder, time.monotonic()
        self._mutex, self._done = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_renewing, daemon=True).start()

    def check(self) -> None:
        """Call before what is held is written to: a process that stood still for long may have lost it."""
        if time.monotonic() - self._renewed > self._expire_seconds / 2:
            self._renew()

    def release(self) -> None:
        """Give it back: the next one need not wait."""
        self._done.set()
        with self._mutex:
            if not self._lock.closed:
                # A full disk keeps nobody from ending.
                with suppress(OSError):
                    if not self._is_lost():
                        os.ftruncate(self._lock.fileno(), 0)
                self._lock.close()

    def _keep_renewing(self) -> None:
        while not self._done.wait(self._renew_seconds):
            self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._done.is_set():
                return
            # A share that is away for a moment lets nobody else take over either.
            with suppress(OSError):
                if self._is_lost():
                    self._on_lost(self._file)
                    return
                self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
                _write(self._lock, self._holder)
                self._renewed = time.monotonic()

    def _is_lost(self) -> bool:
        found = _read(self._file)
        if found is not None:
            return found.token != self._holder.token
        # Given back by another, or removed: then nobody else has it.
        return self._file.exists() and not os.path.samestat(self._file.stat(), os.fstat(self._lock.fileno()))


def take_lease(
    file: Path,
    *,
    machine: str = "",
    renew_seconds: float = RENEW_SECONDS,
    expire_seconds: float = EXPIRE_SECONDS,
    on_lost: Callable[[Path], object] | None = None,
) -> Lease:
    """The lease on a file, which is made; it waits until that of a machine that is gone has expired.

    `on_lost` is called when another process has taken it over; by default this process ends with
    `LOST_STATUS`. Raises LeaseHeldError while another process holds it, and UserError where nothing can
    be locked.
    """
    holder = Holder(
        machine=machine or this_machine(), host=platform.node(), pid=os.getpid(), token=uuid.uuid4().hex
    )
    try:
        lock = _wait_for(file, holder, expire_seconds)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be locked ({error.strerror or error}); give a folder on a disk, or on a share "
            "that carries locks"
        ) from error
    return Lease(
        file,
        lock,
        holder,
        renew_seconds=renew_seconds,
        expire_seconds=expire_seconds,
        on_lost=on_lost or _end,
    )


def _wait_for(file: Path, ours: Holder, expire_seconds: float) -> TextIO:
    """The lock of a lease that is free, or has expired, with this holder's name in it."""
    watch = LeaseWatch(file, machine=ours.machine, expire_seconds=expire_seconds)
    told, beaten_since, held = False, 0.0, 0
    while True:
        holder = watch.holder()
        if holder is None:
            lock = _claim(
                file, ours, watch.expired, again=0 < beaten_since < time.monotonic() - expire_seconds
            )
            if lock is not None:
                return lock
            # Another one was quicker; what it writes is seen soon, unless it has died over it.
            beaten_since = beaten_since or time.monotonic()
        elif watch.alive:
            held += 1
            # Whoever watches has the lock for a moment.
            if held == GLANCES:
                raise LeaseHeldError(holder)
            time.sleep(0.1)
            continue
        elif not told:
            logger.info(
                f"{file}: held by {holder}; taken over after {expire_seconds:.0f} s without a sign of life"
            )
            told = True
        time.sleep(min(1.0, expire_seconds / 10))


def _claim(file: Path, ours: Holder, expired: Holder | None, *, again: bool) -> TextIO | None:
    """Lock a lease that is free, or that of `expired`; None when another process was quicker.

    `again` takes the right of one who was quicker, and made nothing of it.
    """
    if expired is None:
        lock = hold_lock(file)
        if lock is None:
            return None
        found = _read(file)
        is_this_file = file.exists() and os.path.samestat(file.stat(), os.fstat(lock.fileno()))
        if is_this_file and (found is None or found.machine == ours.machine):
            _write(lock, ours)
            return lock
        lock.close()
        return None
    # The lock of a machine that is gone may stay on its file for ever: another file takes its place. Of those
    # who find it expired, one makes this folder at a time.
    right = file.with_name(f"{file.name}.{expired.token}")
    if again:
        shutil.rmtree(right, ignore_errors=True)
    try:
        right.mkdir()
    except FileExistsError:
        return None
    try:
        if _read(file) != expired:
            return None
        fresh = right / file.name
        lock = hold_lock(fresh)
        if lock is not None:
            _write(lock, ours)
            fresh.replace(file)
        return lock
    finally:
        shutil.rmtree(right, ignore_errors=True)


def _read(file: Path) -> Holder | None:
    """What a lease's file says; None where it says nothing, as when it is free or of an older version."""
    for _ in range(5):
        try:
            text = file.read_text(encoding="utf-8")
            return Holder(**json.loads(text)) if text.strip() else None
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            # It is being written.
            time.sleep(0.01)
    return None


def _write(lock: TextIO, holder: Holder) -> None:
    """Write to the locked file itself, always the same number of bytes: no reader finds it empty."""
    os.pwrite(lock.fileno(), json.dumps(dataclasses.asdict(holder)).ljust(LINE_BYTES - 1).encode() + b"\n", 0)


def _end(file: Path) -> None:
    """Leave at once: what this process writes from now on is another's."""
    holder = _read(file)
    message = f"search-r3: {file}: taken over by {holder or 'another process'}; this process stops\n"
    with suppress(OSError):
        os.write(sys.stderr.fileno(), message.encode())
    os._exit(LOST_STATUS)
