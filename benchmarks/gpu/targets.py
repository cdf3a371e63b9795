"""The shapes of the targets: ours by Triton and by csrc, beside the bare products, in one run a shape."""

from __future__ import annotations

import functools

from benchmarks import workers
from benchmarks.cli import Selection
from benchmarks.gpu import clock
from benchmarks.gpu.shapes import SHAPES, Shape, device
from benchmarks.kernels.case import MODES
from benchmarks.kernels.measure import Lineup, Setting, measure
from benchmarks.kernels.operations import OPERATIONS

OURS = ("dpo_fast triton", "dpo_fast cuda")
ROUNDS = {"cpu": 2, "cuda": 11}
# Time and memory where logits would be 19 GiB, with a budget of 1 GiB.
LONG = {False: Shape(65536, 4096, 151936), True: Shape(80, 64, 520)}


def items(rehearse: bool) -> dict:
    found = {
        str(shape): functools.partial(measured, shape, MODES, OURS, True)
        for shape in SHAPES[rehearse]
    }
    some = ("dpo_fast triton, 1 GiB", "dpo_fast cuda, 1 GiB")
    found[f"1 GiB {LONG[rehearse]}"] = functools.partial(
        measured, LONG[rehearse], ("trainable",), some, True, 3
    )
    return found


def measured(
    shape: Shape,
    modes: tuple[str, ...],
    names: tuple[str, ...],
    memory: bool = False,
    rounds: int | None = None,
) -> dict:
    """Rows of `bench kernels` at one shape."""
    setting = Setting("linear_logp", shape.T, shape.D, shape.V, shape.dtype, device(), modes)
    # On a CPU memory is measured by a process for each contender: too long for a rehearsal.
    memory = memory and device() == "cuda"
    lineup = Lineup(Selection(names), rounds or ROUNDS[device()], memory, seconds=clock.left())
    outcome = measure(setting, OPERATIONS["linear_logp"], lineup)
    found = {"rows": outcome.rows}
    if not any(row["impl"] in names for row in outcome.rows):
        found["skipped"] = (
            "; ".join(f"{n}: {why}" for n, why in dict.fromkeys(outcome.refusals))
            or "nobody is left"
        )
    if wrong := outcome.failures + [f"{name}: no time was left" for name in outcome.unreached]:
        found["failed"] = "; ".join(wrong)
    if any(workers.is_fatal(row["note"]) for row in outcome.rows):
        found["restart"] = True  # the next item needs a device
    return found
