"""A limit on the processor time of Python code that others wrote, such as a template that never ends.

It needs no signal, which only the main thread gets. A watching thread raises an exception in the one that
takes too long. A single call of C, such as that of a regular expression, is not interrupted.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
INTERVAL = 0.2  # seconds between looks


class _OutOfTime(BaseException):
    """Raised inside the code. A BaseException, as the code may catch the others."""


@dataclass
class _Call:
    """A call that is watched: of which thread, and until what time of its clock."""

    thread: int
    clock: int
    end: float
    raised: bool = False


_lock = threading.Lock()
_calls: dict[int, _Call] = {}
_watcher: tuple[int, threading.Thread] | None = None  # of this process: a forked one has none


def limited(seconds: float, function: Callable[[], T]) -> T:
    """What the function returns. Raises TimeoutError when it takes more processor time than that."""
    thread = threading.get_ident()
    try:
        try:
            _watch(thread, seconds)
            return function()
        finally:
            _forget(thread)
    except _OutOfTime:
        raise TimeoutError(f"more than {seconds:g} s") from None


def _watch(thread: int, seconds: float) -> None:
    global _watcher
    own = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
    clock = own(thread) if own else time.CLOCK_MONOTONIC
    with _lock:
        if _watcher is None or _watcher[0] != os.getpid():
            _calls.clear()
            _watcher = os.getpid(), threading.Thread(target=_look, daemon=True, name="time limit")
            _watcher[1].start()
        _calls[thread] = _Call(thread, clock, time.clock_gettime(clock) + seconds)


def _forget(thread: int) -> None:
    with _lock:
        call = _calls.pop(thread, None)
        if call is not None and call.raised:  # take back what has not arrived
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


def _look() -> None:
    while True:
        time.sleep(INTERVAL)
        with _lock:
            for call in _calls.values():
                if time.clock_gettime(call.clock) > call.end:
                    call.raised = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(call.thread), ctypes.py_object(_OutOfTime)
                    )
