"""The row pass alone: every tile of the table, and csrc's twin, each beside the bare product in one run.

`precompile` is a step before it, where nothing is timed: it compiles the tiles at the same time on several
cores, and holds each against the shipped one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from benchmarks.gpu.shapes import SHAPES, Shape, device
from benchmarks.kernels.meters import interleave
from benchmarks.machine import summary
from dpo_fast.kernels.alike import difference, evidence
from dpo_fast.kernels.device import arch_of
from dpo_fast.kernels.linear_logp import RowPass
from dpo_fast.kernels.search import candidates
from dpo_fast.kernels.target_product import target_scores
from dpo_fast.ops.linear_logp import cuda, cuda_extension
from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.plan import kept_stride
from dpo_fast.ops.linear_logp.triton import RANGE

ROUNDS = {"cpu": 2, "cuda": 12}
CHECKED = 512  # tokens: a tile is compiled for any number of them


def items(rehearse: bool) -> dict:
    """Times."""
    return {name: functools.partial(time, *what) for name, what in passes(rehearse).items()}


def passes(rehearse: bool) -> dict[str, tuple]:
    """(shape, whether exponentials are kept, tile; None for csrc) by name."""
    shapes = SHAPES[rehearse]
    some = shapes if rehearse else (shapes[1], shapes[3])
    found = {}
    for shape in some:
        for keep in (False, True):
            kind = f"{shape} {'keep' if keep else 'sums'}"
            for config in tiles(shape, keep):
                found[f"{kind} {label(config)}"] = (shape, keep, config)
            if not rehearse:
                found[f"{kind} csrc"] = (shape, keep, None)
    return found


def tiles(shape: Shape, keep: bool) -> list:
    arch = arch_of(torch.device(device()))
    return candidates("rows", arch, torch.bfloat16, shape.D, shape.V, stores=keep)


def label(config) -> str:
    """The fields of a tile that are not at their defaults, in short."""
    sizes = f"{config.block_t}x{config.block_v}x{config.block_d}"
    rest = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.name.startswith("block_") and getattr(config, field.name) != field.default
    }
    return " ".join([sizes, *(f"{name}={value}" for name, value in rest.items())])


@dataclasses.dataclass
class Operands:
    """What a pass reads and writes, made once."""

    inputs: tuple
    score_T: torch.Tensor
    offset_T: torch.Tensor
    kept_TV: torch.Tensor | None


@functools.lru_cache(maxsize=1)
def operands(shape: Shape, keep: bool) -> Operands:
    inputs = shape.inputs()
    hidden, weight, targets = inputs.hidden.detach(), inputs.weight.detach(), inputs.targets
    options = dataclasses.asdict(HeadOptions())
    score_T = target_scores(hidden, weight, None, targets, options)
    offset_T = RowPass(hidden, weight, None, targets, options=options).sums["offset"]
    kept = None
    if keep:
        kept = hidden.new_empty(shape.T, kept_stride(shape.V))[:, : shape.V]
    return Operands((hidden, weight, targets, options), score_T, offset_T, kept)


def launch(shape: Shape, keep: bool, config) -> Callable:
    """A function that does the pass and returns it: a RowPass, or csrc's twin of one."""
    on = operands(shape, keep)
    hidden, weight, targets, options = on.inputs
    given = {"options": options, "score_T": on.score_T}
    if keep:
        given |= {"offset_T": on.offset_T.clone(), "kept_TV": on.kept_TV}
    if config is None:
        return lambda: cuda.row_pass(hidden, weight, None, targets, **given)
    if keep:
        given["largest_shift"] = RANGE
    return lambda: RowPass(hidden, weight, None, targets, config=config, **given)


def check(shape: Shape, keep: bool, config) -> dict:
    """Compile, run once, and compare row sums and stored exponentials with the shipped tile's."""
    if config is None:
        return {"skipped": "csrc is built and checked by its own step"}
    shape = dataclasses.replace(shape, T=min(shape.T, CHECKED))
    shipped = launch(shape, keep, tiles(shape, keep)[0])()
    expected = evidence(shipped.results())
    if keep:
        shipped.kept.fill_(torch.nan)  # what the tile does not write shows
    found = launch(shape, keep, config)()
    gap = (found.sums["logp"] - shipped.sums["logp"]).abs().max().item()
    reason = difference(evidence(found.results()), expected)
    return {"gap": gap} | ({"failed": reason} if reason else {})


def time(shape: Shape, keep: bool, config) -> dict:
    if config is None and cuda_extension.built() is None:
        return {"skipped": "csrc is not built"}
    run = launch(shape, keep, config)
    hidden, weight = operands(shape, keep).inputs[:2]
    logits = torch.empty(shape.T, shape.V, dtype=hidden.dtype, device=hidden.device)
    functions = {
        "pass": lambda number: run(),
        "bare": lambda number: torch.mm(hidden, weight.t(), out=logits),
    }
    for function in functions.values():
        function(0)
    series = interleave(functions, device(), ROUNDS[device()])
    ms = {name: summary(times).p50 for name, times in series.items()}
    rate = 2 * shape.T * shape.D * shape.V / ms["pass"] / 1e9
    return {
        "ms": ms["pass"],
        "bare_ms": ms["bare"],
        "x_bare": ms["pass"] / ms["bare"],
        "tflops": rate,
    }
