"""How long the item that a worker is at may still take, so that it can keep what it has found by then."""

from __future__ import annotations

import time

SPARE = 4.0  # seconds to end what runs, and to answer

_end = float("inf")


def begin(end: float) -> None:
    """An item begins that has to end by then, on the monotonic clock."""
    global _end
    _end = end


def left() -> float:
    """Seconds until it should answer; 1 at the least."""
    return max(1.0, _end - SPARE - time.monotonic())
