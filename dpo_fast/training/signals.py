"""Signals end a run where it can go on later.

SIGINT, SIGTERM, SIGHUP, and SIGUSR1 and SIGUSR2, which schedulers send some time before they kill.
While a run prepares they end it at once; while it trains they ask for a checkpoint (`stop_signals`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dpo_fast.errors import Interrupted
from dpo_fast.training import distributed

T = TypeVar("T")
ALWAYS = (signal.SIGINT, signal.SIGTERM)
# Taken only where nobody has: nohup has SIGHUP ignored, and submitit handles SIGUSR2 itself.
IF_FREE = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
# A terminal sends Ctrl-C to every process, and torchrun passes it on: a rank has it twice.
SAME_SECONDS = 1.0
AGAIN_SECONDS = 3.0  # an exception that has ended nothing by then is raised again
PATIENCE = 3  # the third Ctrl-C no longer waits
_watched: list[socket.socket] = []  # where the system writes signals that have come


class StopNow(KeyboardInterrupt):
    """Ends a run where it is. No `except Exception` of a library holds it up."""


class StopAsked(Exception):
    """A signal came to some rank; raised on all of them between two batches."""


class _Heard:
    """A handler. press: called with the signal's name; those within `SAME_SECONDS` are one."""

    def __init__(self, press: Callable[[str], None]) -> None:
        self.press, self.owner, self.last = press, os.getpid(), -SAME_SECONDS

    def __call__(self, number: int, frame) -> None:
        if os.getpid() != self.owner:  # a worker that was forked off: it ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self.last >= SAME_SECONDS:
            self.last = now
            self.press(signal.Signals(number).name)


@contextlib.contextmanager
def _handled(heard: _Heard) -> Iterator[None]:
    """Put the handler in place, and afterwards those that were there. Only a main thread has signals."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number in IF_FREE if signal.getsignal(number) in (signal.SIG_DFL, None)]
        ours = [number for number in IF_FREE if isinstance(signal.getsignal(number), _Heard)]
        for number in (*ALWAYS, *free, *ours):
            previous[number] = signal.signal(number, heard)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def stop_at_once(remedy: str) -> Iterator[None]:
    """A signal raises Interrupted where the program is: there is nothing to save.

    remedy: what is kept, and how to go on.
    """

    over = threading.Event()

    def end(name: str) -> None:
        threading.Thread(target=again, args=[getattr(signal, name)], daemon=True).start()
        raise StopNow(name)

    def again(number: int) -> None:  # Python drops what is raised in a __del__ or a callback
        if not over.wait(AGAIN_SECONDS):
            os.kill(os.getpid(), number)

    heard = _Heard(end)
    told, watched = _told_as_interruption(remedy), _ended_from_outside(heard, remedy)
    with told, _silent_where_dropped(), _handled(heard), watched:
        try:
            yield
        finally:
            over.set()


@contextlib.contextmanager
def _silent_where_dropped() -> Iterator[None]:
    """Python prints a traceback of an exception that it drops. That of an end comes again (`again`)."""
    before = sys.unraisablehook

    def hook(dropped) -> None:
        if not issubclass(dropped.exc_type, StopNow):
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _ended_from_outside(heard: _Heard, remedy: str) -> Iterator[None]:
    """End the process if a signal comes and its handler does not run.

    The main thread may wait in a function of C, as for ranks that have not come, and Python runs a handler
    between two of its own instructions.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        with ours:
            while number := ours.recv(1):
                came = time.monotonic()
                time.sleep(AGAIN_SECONDS)
                if signal.getsignal(number[0]) is heard and heard.last < came - SAME_SECONDS:
                    name = signal.Signals(number[0]).name
                    distributed.end_at_once(
                        f"interrupted by {name}; {remedy}", Interrupted.exit_code
                    )

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    _watched.append(theirs)
    threading.Thread(target=watch, name="dpo_fast signals", daemon=True).start()
    try:
        yield
    finally:
        _watched.remove(theirs)
        signal.set_wakeup_fd(before)
        theirs.close()


def _not_of_the_parent() -> None:
    """In a worker that was forked off, whose signals are not those of the run."""
    if _watched:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_not_of_the_parent)


@contextlib.contextmanager
def stop_signals(remedy: str) -> Iterator[Callable[[], bool]]:
    """Yields asked(), collective: whether a signal has come to any rank.

    It asks for an end after the step, with a checkpoint. So does a second Ctrl-C; a third one raises
    Interrupted at once. remedy: how to go on after that.
    """

    seen: list[str] = []

    def press(name: str) -> None:
        if seen and name != "SIGINT":
            return  # schedulers and launchers repeat theirs
        seen.append(name)
        if len(seen) >= PATIENCE:
            raise StopNow(name)
        left = "twice more ends" if len(seen) == 1 else "once more ends"
        _write(f"{name}: stopping as soon as it can be saved; Ctrl-C {left} it at once")

    with _told_as_interruption(remedy), _handled(_Heard(press)):
        yield lambda: distributed.any_rank(bool(seen))


def press() -> bool:
    """As if Ctrl-C came to this process now; false where nobody here would hear it.

    Raises StopNow where a run prepares, or at a third one.
    """
    heard = isinstance(signal.getsignal(signal.SIGINT), _Heard)
    if heard := heard and threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.SIGINT)
    return heard


def until(asked: Callable[[], bool] | None, items: Iterable[T]) -> Iterator[T]:
    """Items, as many as every rank has. Raises StopAsked before one of them once a signal has come."""
    for item in items:
        if asked is not None and asked():
            raise StopAsked
        yield item


@contextlib.contextmanager
def _told_as_interruption(remedy: str) -> Iterator[None]:
    try:
        yield
    except StopNow as stop:
        raise Interrupted(f"interrupted by {stop}; {remedy}") from None


def _write(line: str) -> None:
    """Rank 0 says it, past Python's buffers: a handler may run in the middle of a print."""
    if distributed.is_main():
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())
