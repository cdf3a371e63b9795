"""What the command line tells without a traceback: mistakes that a user can mend, and interruptions."""

import traceback

from dpo_fast.frames import own_frames
from dpo_fast.wording import clipped, printable

LONGEST = 6000  # characters of a message, of which no reason needs as many


class Told(Exception):
    """An error whose message says everything: a notebook shows the lines of its own above it alone."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback."""
        lines = traceback.format_list(own_frames(self.__traceback__))
        return [*"".join(lines).splitlines(), f"{type(self).__name__}: {self}"]


class UserError(Told, ValueError):
    """Bad input, or an option that cannot be honoured: names it, its value and the remedy.

    A message quotes files and rows that others wrote: whatever a terminal would obey is written out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(clipped(printable(str(message)), LONGEST))


class UnavailableError(UserError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Interrupted(Told):
    """A signal ended the run. The message says what is kept, and how to go on."""

    exit_code = 130


class LostPeer(Told):
    """A collective failed because another rank is lost or silent: nothing is wrong in this one."""

    exit_code = 3


class Unhealthy(Interrupted):
    """A finding that `health.stop_on` names ended a run after its step; a checkpoint is saved."""

    exit_code = 4
