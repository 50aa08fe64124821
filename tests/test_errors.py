"""Which errors pass by themselves, and the statuses that launchers start again."""

import errno

import pytest

from search_r3_jax.errors import TransientError, UserError, passes_by_itself, status_of


def chained(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as found:
        return found


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (ValueError("UNAVAILABLE: the server is gone"), True),
        (ValueError("NOT_FOUND: no such object"), False),
        (chained(RuntimeError("a save failed"), OSError(errno.ETIMEDOUT, "Connection timed out")), True),
        (chained(RuntimeError("a save failed"), OSError(errno.EACCES, "Permission denied")), False),
    ],
)
def test_what_passes_by_itself(error: Exception, passes: bool) -> None:
    assert passes_by_itself(error) == passes


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TransientError("the hub is busy"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (UserError("a mistake"), 2),
        (ValueError("UNAVAILABLE: says a bug of ours"), 1),
    ],
)
def test_statuses(error: Exception, status: int) -> None:
    assert status_of(error) == status
