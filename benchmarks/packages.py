"""Peers' packages. None is needed: what is not there is named, with the command that installs it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from benchmarks import machine


@dataclass(frozen=True)
class Package:
    """A peer's distribution, its top-level module, the command that installs it, and the modules that
    take seconds to import."""

    name: str
    module: str
    pip: str
    heavy: tuple[str, ...] = ()

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.name} is not installed: {self.pip}"

    def version(self) -> str:
        found = machine.version(self.name)
        return f"{self.name} {found}" if found else ""


TRL = Package(
    "trl", "trl", 'pip install "trl>=1.16,<2"', heavy=("trl.kernels", "trl.trainer.utils")
)
LIGER = Package(
    "liger-kernel",
    "liger_kernel",
    'pip install "liger-kernel>=0.8.5"',
    heavy=("liger_kernel.chunked_loss",),
)
CCE = Package("cut-cross-entropy", "cut_cross_entropy", "pip install cut-cross-entropy")
QUACK = Package("quack-kernels", "quack", "pip install quack-kernels")
