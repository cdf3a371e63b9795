"""What `make gpu` does, in its order: a table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Step:
    """One step. Its module has `items(rehearse)`: functions by name, each of which returns a line's fields.

    phase: steps of one phase run at the same time. What takes times has one for itself.
    processes: that work on its items at a time.
    seconds: that one item may take.
    """

    name: str
    module: str
    phase: int
    processes: int
    seconds: float

    def load(self) -> ModuleType:
        return importlib.import_module(f"benchmarks.gpu.{self.module}")


# Correctness comes before numbers, and the most telling numbers come first: time may run out.
STEPS = {
    step.name: step
    for step in (
        Step("machine", "machine", 0, 1, 60),
        Step("faults", "faults", 0, 1, 5),
        Step("smoke", "smoke", 1, 3, 90),
        Step("csrc", "csrc", 1, 1, 150),
        Step("precompile", "precompile", 1, 3, 60),
        Step("suites", "suites", 1, 6, 110),
        Step("features", "features", 1, 3, 120),
        Step("targets", "targets", 2, 1, 60),
        Step("rows", "rows", 3, 1, 60),
        Step("trace", "trace", 4, 1, 120),
        Step("train", "train", 5, 1, 120),
        Step("peers", "peers", 6, 1, 60),
        Step("profile", "profile", 7, 1, 60),
        Step("sanitize", "sanitize", 8, 1, 120),
    )
}
