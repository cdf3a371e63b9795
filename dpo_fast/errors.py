"""The one exception for mistakes that a user can mend. The command line prints it without a traceback."""


class UserError(ValueError):
    """Bad input, or an option that cannot be honoured: names it, its value and the remedy."""


class UnavailableError(UserError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""
