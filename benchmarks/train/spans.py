"""Seconds spent inside chosen functions, by name, on the device's own clock."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable

import torch


class Spans:
    """A function called inside another that is timed counts for the outer one: the head of a
    reference's forward is the reference's.

    On a GPU a span is a pair of events, read when the step is over: nothing waits.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.depth = 0
        self.pending: list[tuple] = []

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            if self.depth:
                return function(*arguments, **options)
            self.depth += 1
            start = self._mark()
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                self.pending.append((name, start, self._mark()))

        return call

    def watch_autograd(self, function: type[torch.autograd.Function], name: str) -> None:
        """Time forward and backward of an autograd function, from now on."""
        for part in ("forward", "backward"):
            setattr(function, part, staticmethod(self.timed(getattr(function, part), name)))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, start, end in self.pending:
            totals[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.pending.clear()
        return dict(totals)

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
