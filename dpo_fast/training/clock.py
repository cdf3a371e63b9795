"""How long parts of a step take. On a GPU by events, which wait for nothing until they are read."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def peak_memory(device: torch.device) -> float:
    """GiB that the process held at most since it began: on a GPU of the device, else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)


class Clock:
    """Adds up the milliseconds between `begin` and `end` of each name."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        """Without a `begin` before it nothing is added."""
        if (start := self._open.pop(name, None)) is not None:
            self.spans.append((name, start, self._now()))

    @contextmanager
    def time(self, name: str):
        self.begin(name)
        yield
        self.end(name)

    def read(self) -> dict[str, float]:
        """Milliseconds since the last reading, by name. Waits for the device."""
        if self.spans and self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            spent = start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
            sums[name] = sums.get(name, 0.0) + spent
        self.spans = []
        return sums

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch_head(head: nn.Module, clock: Clock, name: str = "perf/head_ms") -> None:
    """Time the forward of a `FusedHead` that is trained through, and its backward: from the gradient of its
    log-probabilities to that of its hidden states. Scoring without gradients is not counted."""

    def before(module, arguments) -> None:
        if torch.is_grad_enabled() and len(arguments) > 1:
            clock.begin(name)

    def after(module, arguments, output) -> None:
        if not (isinstance(output, dict) and torch.is_grad_enabled()):
            return
        clock.end(name)
        hidden, logp = arguments[0], output["logp"]
        if hidden.requires_grad and logp.requires_grad:
            logp.register_hook(lambda grad: _then(clock.begin, name))
            hidden.register_hook(lambda grad: _then(clock.end, name))

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


def _then(act, name: str) -> Tensor | None:
    """For a hook of a gradient, which leaves it as it is."""
    act(name)
