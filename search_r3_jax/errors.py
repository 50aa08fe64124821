"""The exceptions that are meant for the user."""

from collections.abc import Sequence


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
