"""Forked processes that end with the one that started them, however that ends.

`datasets` starts workers and a manager that wait for ever for a parent that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # of Linux
_bound: list[tuple[int, ctypes.CDLL]] = []  # the parent, while it starts processes


@contextlib.contextmanager
def bound_to_this_process() -> Iterator[None]:
    """Processes that are forked inside are killed when this one, or the thread that forks, has ended."""
    if sys.platform != "linux":
        yield
        return
    _bound.append((os.getpid(), ctypes.CDLL(None)))
    try:
        yield
    finally:
        _bound.pop()


def _bind() -> None:
    """In the new process."""
    if _bound:
        parent, libc = _bound[-1]
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_bind)
