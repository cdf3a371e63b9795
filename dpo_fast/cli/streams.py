"""A terminal that went away, a closed pipe or a full disk under the log ends no run: lines are lost."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

# Commands whose standard output only says what they did; that of the others is what they are for.
ONLY_SAYS = ("train", "reference", "sample", "iterate", "demo")
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)


def own_arguments(words: list[str]) -> list[str]:
    """Without --local_rank=N, which launchers put before ours; LOCAL_RANK says the same."""
    return [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]


class Lossy:
    """A text stream that loses what cannot be written."""

    def __init__(self, stream) -> None:
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def give_up(self) -> None:
        """Before the interpreter ends, which flushes once more and has an exit code for what it meets."""
        self.flush()
        if self._lost:
            self._to_nowhere()

    def _failed(self, error: OSError) -> None:
        """A reader that went away does not come back; a full disk may be cleared."""
        self._lost = True
        if error.errno in GONE:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def survive(arguments: list[str]) -> None:
    """From now on nothing that is said ends a command. Standard output of a few only: see ONLY_SAYS."""
    for number in (0, 1, 2):  # else the next file that is opened would be taken for it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    names = ("stdout", "stderr") if any(x in ONLY_SAYS for x in arguments[:1]) else ("stderr",)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        if name in names:
            setattr(sys, name, Lossy(getattr(sys, name)))


def give_up() -> None:
    """At the end of a command: what cannot be written by now is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Lossy):
            stream.give_up()
