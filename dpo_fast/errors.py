"""What the command line tells without a traceback: mistakes that a user can mend, and interruptions."""


class UserError(ValueError):
    """Bad input, or an option that cannot be honoured: names it, its value and the remedy."""


class UnavailableError(UserError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Interrupted(Exception):
    """A signal ended the run. The message says what is kept, and how to go on."""

    exit_code = 130


class LostPeer(Exception):
    """A collective failed because another rank is lost or silent: nothing is wrong in this one."""

    exit_code = 3


class Unhealthy(Interrupted):
    """A finding that `health.stop_on` names ended a run after its step; a checkpoint is saved."""

    exit_code = 4
