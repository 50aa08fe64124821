"""The one exception whose text is meant for the user."""


class UserError(Exception):
    """A mistake the user can mend: one line naming file, field and remedy; the command line exits with 2."""
