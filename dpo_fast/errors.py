"""What the command line tells without a traceback: mistakes that a user can mend, and interruptions."""

from pathlib import Path


class UserError(ValueError):
    """Bad input, or an option that cannot be honoured: names it, its value and the remedy."""


class UnavailableError(UserError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Interrupted(Exception):
    """SIGINT or SIGTERM ended a run after its step; the checkpoint is at `folder`."""

    exit_code = 130

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; resume with train.resume_from_checkpoint={folder}")
        self.folder = folder
