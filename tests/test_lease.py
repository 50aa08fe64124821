"""A lease has one holder; it ends with its process, and soon after its machine is gone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from search_r3_jax import lease as lease_module
from search_r3_jax.errors import UserError
from search_r3_jax.lease import Lease, LeaseHeldError, LeaseWatch, take_lease

EXPIRE = 0.5
# A process of its own may get no time for a while on a busy machine.
LONG_EXPIRE = 3.0
HOLD = (
    "import sys, time; from pathlib import Path; from search_r3_jax.lease import take_lease\n"
    "lease = take_lease(Path(sys.argv[1]), machine=sys.argv[2], renew_seconds=0.1, expire_seconds=3.0)\n"
    "print('held', flush=True)\n"
    "while True: time.sleep(0.05); lease.check(); print('wrote', flush=True)"
)


def take(file: Path, machine: str = "", *, expire: float = EXPIRE) -> Lease:
    """A lease of this process, which does not end when it is lost."""
    return take_lease(file, machine=machine, renew_seconds=0.1, expire_seconds=expire, on_lost=lambda _: None)


def abandoned(file: Path) -> Lease:
    """A lease of a machine that is gone: nobody renews it."""
    return take_lease(file, machine="far", renew_seconds=1e6, expire_seconds=EXPIRE, on_lost=lambda _: None)


def holder(file: Path, machine: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), machine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trainer.lock"


def test_one_holder_and_given_back_it_is_free_at_once_for_all(file: Path) -> None:
    for machine in ("", "one", "two"):
        held = take(file, machine)
        with pytest.raises(LeaseHeldError, match=r"process \d+ on "):
            take(file, machine)
        started = time.monotonic()
        held.release()
        held.release()
        assert LeaseWatch(file, machine="third").holder() is None
        assert time.monotonic() - started < EXPIRE / 2


def test_on_one_machine_it_ends_with_its_process(file: Path) -> None:
    process = holder(file, lease_module.this_machine())
    with pytest.raises(LeaseHeldError, match=f"process {process.pid} on "):
        take(file)
    process.kill()
    process.wait()
    started = time.monotonic()
    take(file).release()
    assert time.monotonic() - started < EXPIRE / 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_is_gone_is_waited_for_and_then_it_is_taken_over(
    file: Path, stop: signal.Signals, log_lines: list[str]
) -> None:
    process = holder(file, "far")
    # It shows life: nobody waits.
    started = time.monotonic()
    with pytest.raises(LeaseHeldError, match=f"process {process.pid} on "):
        take(file, "near", expire=LONG_EXPIRE)
    assert time.monotonic() - started < LONG_EXPIRE
    process.send_signal(stop)
    started = time.monotonic()
    # Stopped, it still has the lock of its file, as of a machine that a file server waits for.
    held = take(file, "near", expire=LONG_EXPIRE)
    assert time.monotonic() - started >= LONG_EXPIRE
    assert any("taken over after 3 s without a sign of life" in line for line in log_lines)
    with pytest.raises(LeaseHeldError):
        take(file, "near")
    if stop == signal.SIGSTOP:
        process.send_signal(signal.SIGCONT)
        out, said = process.communicate(timeout=10)
        assert process.returncode == lease_module.LOST_STATUS
        assert f"{file}: taken over by process" in said
        # What it printed before it stood still is there, and at most one line of what it was about to do.
        assert out.endswith("wrote\n")
    process.kill()
    process.wait()
    held.release()
    assert sorted(each.name for each in file.parent.iterdir()) == ["trainer.lock"]


def test_a_process_that_stood_still_writes_nothing_after_it_lost(file: Path) -> None:
    lost = list[Path]()
    old = take_lease(file, machine="far", renew_seconds=1e6, expire_seconds=EXPIRE, on_lost=lost.append)
    new = take(file, "near")
    old.check()
    assert lost == [file]
    old.release()
    with pytest.raises(LeaseHeldError):
        take(file, "third", expire=LONG_EXPIRE)
    new.release()


def test_lost_is_what_another_has_or_had_and_not_what_was_removed(file: Path) -> None:
    lost = list[Path]()
    old = take_lease(file, machine="far", renew_seconds=1e6, expire_seconds=0.0, on_lost=lost.append)
    file.unlink()
    old.check()
    assert lost == []
    new = take(file, "near")
    old.check()
    assert lost == [file]
    new.release()
    old.check()
    assert lost == [file, file]
    old.release()


@pytest.mark.slow
def test_of_many_who_see_it_expire_one_gets_it(file: Path) -> None:
    abandoned(file)
    got, refused = list[Lease](), list[LeaseHeldError]()

    def race(number: int) -> None:
        try:
            got.append(take(file, f"machine {number}", expire=LONG_EXPIRE))
        except LeaseHeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_one_who_died_while_taking_over_is_followed_by_another(file: Path) -> None:
    abandoned(file)
    token = json.loads(file.read_text())["token"]
    (file.parent / f"{file.name}.{token}").mkdir()
    take(file, "near").release()
    assert sorted(each.name for each in file.parent.iterdir()) == ["trainer.lock"]


def test_a_file_of_an_older_version_is_the_operating_systems(file: Path) -> None:
    file.touch()
    lock = lease_module.hold_lock(file)
    assert lock is not None
    with pytest.raises(LeaseHeldError, match="older version"):
        take(file)
    lock.close()
    take(file).release()


def test_where_nothing_can_be_locked_a_line_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Path) -> None:
        raise OSError(37, "No locks available", str(file))

    monkeypatch.setattr(lease_module, "hold_lock", no_locks)
    with pytest.raises(
        UserError, match=r"trainer\.lock: cannot be locked \(No locks available\); give a folder"
    ):
        take(file)
