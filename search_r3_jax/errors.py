"""The exceptions that are meant for the user."""

import errno
import os
from collections.abc import Iterator, Sequence

# Errors of a disk, or of a pipe whose reader has gone.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EPIPE)
# Errors of a share or a network that come and go.
PASSING_ERRORS = (
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN, errno.EREMOTEIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
)
# So libraries call them that tell no number.
_PASSING_WORDS = (*map(os.strerror, PASSING_ERRORS), "DEADLINE_EXCEEDED", "UNAVAILABLE")
# Exit statuses: of a user's mistake, and of what passes by itself, which launchers start again.
USER_STATUS, TRY_AGAIN = 2, 75


class UserError(Exception):
    """A mistake the user can mend: one line naming file, field and remedy; the command line exits with 2.

    Where one line cannot hold what differs, a small `table` stands below it.
    """

    def __init__(self, line: str = "", *, table: Sequence[str] = ()):
        super().__init__("\n".join([line, *table]))
        self.line, self.table = line, tuple(table)


class TransientError(Exception):
    """What passes by itself, such as a network that is down: the command line says so and exits with 75."""


class StoppedError(Exception):
    """Training ended early because it was asked to, and has saved where it was; the command line says so and
    exits with 0."""


class EmbeddingError(UserError):
    """An embedding without a direction: a number in it is not finite, or all are zero."""


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from, one after another."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def passes_by_itself(error: BaseException) -> bool:
    """Whether an error is of a share or a network that comes and goes."""
    return any(
        each.errno in PASSING_ERRORS
        if isinstance(each, OSError) and each.errno is not None
        else any(word in str(each) for word in _PASSING_WORDS)
        for each in causes_of(error)
    )


def not_written(what: object, error: BaseException, remedy: str) -> UserError | TransientError:
    """The error of what cannot be written: passing, or the user's, who needs the remedy."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # Libraries add pages.
    message = f"{what}: cannot be written ({next(iter(reason.strip().splitlines()), type(error).__name__)})"
    return TransientError(message) if passes_by_itself(error) else UserError(f"{message}; {remedy}")


def status_of(error: Exception) -> int:
    """The exit status of a command that ends by `error`."""
    if isinstance(error, TransientError) or (isinstance(error, OSError) and passes_by_itself(error)):
        return TRY_AGAIN
    is_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return USER_STATUS if is_disk or isinstance(error, UserError) else 1
