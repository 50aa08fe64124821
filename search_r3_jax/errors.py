"""The exceptions that are meant for the user."""


class UserError(Exception):
    """A mistake the user can mend: one line naming file, field and remedy; the command line exits with 2."""


class StoppedError(Exception):
    """Training ended early because it was asked to, and has saved where it was; the command line says so and
    exits with 0."""


class EmbeddingError(UserError):
    """An embedding without a direction: a number in it is not finite, or all are zero."""
