"""What the command line tells without a traceback: mistakes that a user can mend, and interruptions."""

from pathlib import Path

from dpo_fast.wording import clipped, printable

LONGEST = 6000  # characters of a message, of which no reason needs as many


class UserError(ValueError):
    """Bad input, or an option that cannot be honoured: names it, its value and the remedy.

    A message quotes files and rows that others wrote: whatever a terminal would obey is written out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(clipped(printable(str(message)), LONGEST))


class UnavailableError(UserError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Interrupted(Exception):
    """SIGINT or SIGTERM ended a run after its step; the checkpoint is at `folder`."""

    exit_code = 130

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; resume with train.resume_from_checkpoint={folder}")
        self.folder = folder
