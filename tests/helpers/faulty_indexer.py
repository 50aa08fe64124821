"""An indexer that meets one fault, once: `faulty_indexer.py RUN PARENT FAULT`."""

import errno
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_r3_jax.console import show_log
from search_r3_jax.hub.snapshot_reader import snapshot_folder
from search_r3_jax.retrieval.indexer import worker as indexer
from search_r3_jax.retrieval.store import corpus_vectors as corpus
from search_r3_jax.retrieval.store import versions
from search_r3_jax.rollout.encoder import Encoder

RUN, PARENT, FAULT = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
MARK = RUN / "fault-met"


def first_time() -> bool:
    """Whether the fault has yet to be met; from now on it has been."""
    if MARK.exists():
        return False
    MARK.write_text(FAULT)
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, fault: Callable[..., object]) -> None:
    """Call `fault` before a function, with its arguments, until it has been met."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        fault(*arguments)
        return function(*arguments, **named)

    setattr(owner, name, wrapped)


def die_once(*_: Any) -> None:
    if first_time():
        die()


def on_target(pattern: str, fault: Callable[[], object]) -> Callable[..., None]:
    """Meets the fault when a file or folder is about to take a name."""

    def meet(_: Any, target: Any, *__: Any) -> None:
        if re.search(pattern, os.fspath(target)) and first_time():
            fault()

    return meet


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def delete_snapshot(run: Path, step: int, *_: Any) -> None:
    if first_time():
        shutil.rmtree(snapshot_folder(run) / str(step))


def stop_clocks_from_agreeing() -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (30 if calls[0] % 2 else -30) * 86_400.0

    time.time = jumping


if FAULT == "killed while encoding":
    before(Encoder, "encode", die_once)
elif FAULT == "killed between shards":
    before(corpus, "write_array", die_once)
elif FAULT == "killed while building":
    before(versions, "probe_recall", die_once)
elif FAULT == "killed before the rename":
    before(os, "rename", on_target(r"/v\d+$", die))
elif FAULT == "killed before the pointer":
    before(os, "replace", on_target(r"/CURRENT$", die))
elif FAULT == "disk full while publishing":
    before(os, "rename", on_target(r"/v\d+$", no_space))
elif FAULT == "disk full at the pointer":
    before(os, "replace", on_target(r"/CURRENT$", no_space))
elif FAULT == "snapshot deleted":
    before(indexer, "read_snapshot", delete_snapshot)
elif FAULT == "silent":
    before(Encoder, "encode", lambda *_: first_time() and os.kill(os.getpid(), signal.SIGSTOP))
elif FAULT == "clocks jump":
    stop_clocks_from_agreeing()
elif FAULT:
    raise SystemExit(f"no such fault: {FAULT}")

show_log(sys.stdout)
indexer.RETRY_SECONDS = 0.2
indexer.run_indexer(RUN, parent=PARENT)
