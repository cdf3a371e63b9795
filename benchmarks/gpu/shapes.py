"""The shapes that the steps measure, on a card and in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.case import HeadInputs, head_inputs
from benchmarks.machine import DTYPES


@dataclass(frozen=True)
class Shape:
    """Sizes of a loss head."""

    T: int
    D: int
    V: int
    dtype: str = "bf16"

    def inputs(self, seed: int = 0) -> HeadInputs:
        return head_inputs(self.T, self.D, self.V, DTYPES[self.dtype], device(), seed)

    def __str__(self) -> str:
        return f"T{self.T} D{self.D} V{self.V} {self.dtype}"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# By whether it is a rehearsal, which Triton's interpreter has to live through.
SHAPES = {
    False: (
        Shape(4096, 4096, 128256),
        Shape(8192, 4096, 128256),
        Shape(8192, 4096, 151936),
        Shape(16384, 896, 151936),
    ),
    True: (Shape(48, 64, 520),),
}
