"""Roughly how much memory a rank needs, from sizes alone: what is sharded, and what waits where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.models.load import DTYPES
from dpo_fast.training.config import RunConfig

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Elements. gathered: of the largest part that stage 3 gathers at a time; reference: of a second
    model, 0 without one; old: of that of reference.old_path. head_bytes: what the head keeps between
    forward and backward, and its tiles.
    """

    parameters: int
    trainable: int
    gathered: int
    reference: int
    head_bytes: int
    old: int = 0


class Line(NamedTuple):
    """Bytes of one rank on its device and in CPU memory, and how they come about."""

    what: str
    device: float
    host: float
    how: str


def memory(config: RunConfig, sizes: Sizes, ranks: int) -> list[Line]:
    """What weights, gradients, optimiser states, reference and head take. Activations and the buckets
    of DeepSpeed come on top; they depend on the batch and on DeepSpeed's own options."""
    parallel, size = config.parallel, DTYPES[config.model.dtype].itemsize
    stage = parallel.zero_stage

    def line(what: str, elements: int, each: int, sharded_from: int, offloaded: bool) -> Line:
        sharded = stage >= sharded_from and ranks > 1
        total = elements * each / (ranks if sharded else 1)
        how = f"{elements:,} x {each} bytes" + (f" / {ranks} ranks" if sharded else "")
        return Line(what, 0.0 if offloaded else total, total if offloaded else 0.0, how)

    lines = [line("weights", sizes.parameters, size, 3, parallel.offload_parameters)]
    if stage == 3:
        lines.append(line("weights in use", sizes.gathered, size, 4, False))
    summed = FP32 if stage else size  # DeepSpeed's stages add micro-batches up in fp32
    lines.append(line("gradients", sizes.trainable, summed, 2, parallel.offload_optimizer))
    # Two moments, and the fp32 weights that DeepSpeed updates; plain fp32 weights are their own.
    states = (3 if stage or size < FP32 else 2) * FP32
    lines.append(line("optimiser states", sizes.trainable, states, 1, parallel.offload_optimizer))
    if sizes.reference:
        when = "" if config.reference_provider in ("frozen", "ema") else ", before training"
        name = f"reference model{when}"
        lines.append(line(name, sizes.reference, size, 3, config.offloads_reference))
    if sizes.old:
        name = "reference.old_path, before training"
        lines.append(line(name, sizes.old, size, 3, config.offloads_reference))
    lines.append(Line("head workspace", sizes.head_bytes, 0.0, "the schedule above"))
    return lines


def in_units(size: float) -> str:
    """Bytes for people to read."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1024:.0f} KiB" if size else "-"
