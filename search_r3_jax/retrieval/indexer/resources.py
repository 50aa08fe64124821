"""What the indexer process may use of the machine, and that it ends with its parent."""

from __future__ import annotations

import os
import threading
import time

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError


def limit_resources(index: IndexConfig) -> None:
    """Lower this process's priority and limit its threads and cores; call before JAX starts threads."""
    os.nice(index.nice)
    if index.cores:
        try:
            os.sched_setaffinity(0, index.cores)
        except OSError as error:
            raise UserError(
                f"index.cores: {index.cores}: not all of them are this machine's ({error.strerror})"
            ) from None
    if index.threads:
        # XLA sizes its CPU thread pool by this.
        os.environ["NPROC"] = str(index.threads)


def end_with(parent: int) -> None:
    """End this process when `parent`, which started it, has ended in any way."""

    def watch() -> None:
        # Polling, because a killed parent sends no signal.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
