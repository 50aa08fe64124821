"""Start of a JAX cluster of several processes, and a clean exit of all when one of them dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

from search_r3_jax.distributed.peers import SILENT_SECONDS, Peers
from search_r3_jax.distributed.spec import Cluster, explicit_cluster, is_detectable
from search_r3_jax.errors import StoppedError, TransientError, UserError, status_of


@contextmanager
def join_cluster(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the other processes, if there are any, before JAX is used.

    The cluster comes from flags, the environment, SLURM or a TPU's metadata. While the context is open, this
    process exits with `TRY_AGAIN` soon after another has died or failed, and with `USER_STATUS` soon after it
    or another has left with a UserError. Raises UserError for incomplete settings, and TransientError where
    the processes do not find each other.
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
    if jax.process_count() == 1:
        yield
        return
    peers = Peers(host)
    try:
        yield
    except StoppedError:
        peers.part()
        raise
    except UserError as error:
        peers.leave(error)
    except Exception as error:
        peers.fail(status_of(error))
        raise
    peers.part()


def is_first() -> bool:
    """Whether this is the process that writes shared files."""
    return jax.process_index() == 0


def _local_address() -> str:
    """This machine's address as others reach it."""
    try:
        # Sends nothing: it only asks which interface a packet would leave by.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"
