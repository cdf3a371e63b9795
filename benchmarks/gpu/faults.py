"""Of a rehearsal alone: an item that hangs, one that crashes, and one that raises, between two that do not.

What comes of them shows that a fault costs its own line and no other.
"""

from __future__ import annotations

import os
import signal
import time


def items(rehearse: bool) -> dict:
    if not rehearse:
        return {}
    return {"before": fine, "hangs": hangs, "crashes": crashes, "raises": raises, "after": fine}


def fine() -> dict:
    return {"pid": os.getpid()}


def hangs() -> dict:
    time.sleep(3600)
    return {}


def crashes() -> dict:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def raises() -> dict:
    raise ValueError("on purpose")
