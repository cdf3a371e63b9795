"""The peers at two of the targets' shapes, one item each, beside the bare products."""

from __future__ import annotations

import functools

from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.targets import measured
from benchmarks.kernels.case import MODES

ROUNDS = 5
# The most telling ones first. Liger's eager form and the extras are for `bench kernels`.
PEERS = (
    "trl",
    "liger scaled ce",
    "liger ce, per token",
    "cce, exact",
    "cce, filtered",
    "quack ce",
    "liger ce, sm_90",
    "liger ce",
    "materialised",
    "torch linear_cross_entropy",
    "liger dpo, compiled",
    "materialised, compiled",
)


def items(rehearse: bool) -> dict:
    shapes, names = SHAPES[rehearse], PEERS
    if rehearse:  # torch.compile takes longer than the rest of a rehearsal's peers together
        names = tuple(name for name in PEERS if "compiled" not in name)
    else:
        shapes = shapes[1], shapes[3]
    return {
        f"{name}, {shape}": functools.partial(measured, shape, MODES, (name,), True, ROUNDS)
        for shape in shapes
        for name in names
    }
