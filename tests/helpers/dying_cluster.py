"""A program for tests: a process of a cluster ends while another waits for it, is busy, or ends by an error.

Arguments: who ends, how, what the others do, process index, number of processes, port of the coordinator.
"""

import ctypes
import os
import signal
import sys
import time

import jax
import numpy as np
from helpers.jax_processes import joined
from jax.experimental import multihost_utils

from search_r3_jax.errors import TransientError

BUSY_MICROSECONDS = 1_500_000


def main(victim: int, how: str, others: str) -> None:
    everywhere = multihost_utils.process_allgather(np.array(jax.process_index()))
    assert everywhere.tolist() == list(range(jax.process_count()))
    if jax.process_index() == victim:
        if how == "fails":
            raise RuntimeError("an error of its own")
        if how == "tries again":
            raise TransientError("passes by itself")
        time.sleep(0.0 if others == "wait" else 1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    if others == "fail":
        raise RuntimeError("an error of its own")
    if others == "busy":
        # Calls C code without letting other threads run, as a compiler may.
        ctypes.PyDLL(None).usleep(BUSY_MICROSECONDS)
    multihost_utils.process_allgather(np.zeros(3))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
