"""The options of `bench kernels`, checked."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass

from benchmarks.kernels import suite
from benchmarks.kernels.case import MODES
from benchmarks.kernels.measure import Group
from benchmarks.kernels.registry import OPERATIONS, contender_names
from benchmarks.machine import DTYPES
from benchmarks.options import Parser, choose_device, positive, whole
from benchmarks.output import Output
from benchmarks.selection import Selection
from dpo_fast.errors import UserError

USAGE = """measure every implementation of the loss head, and of the operations round it, in one run

By default: on a GPU the points of the targets and the curve against T, in bf16; on a CPU one point
(T 2048, D 896, V 32000) in fp32 and bf16. Lists are separated by commas."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the rows go."""

    groups: tuple[Group, ...]
    selection: Selection
    output: Output
    repeats: int | None
    budget_minutes: float | None
    memory: bool


def parser() -> argparse.ArgumentParser:
    made = Parser("bench kernels", USAGE)
    add = made.add_argument
    add("--ops", metavar="NAMES", help=f"operations: {', '.join(OPERATIONS)} (default: all)")
    add("--shape", metavar="HEAD", help=f"{', '.join(suite.HEADS)}, or D,V as in 896,32000")
    add("--tokens", metavar="T,...", help="scored tokens; with --growth the curve's")
    add("--modes", metavar="NAMES", help=f"{', '.join(MODES)} (default: all)")
    add("--dtypes", metavar="NAMES", help=f"{', '.join(DTYPES)}")
    made.add_common("--only", "--skip")
    add("--repeats", metavar="N", help="rounds, each contender once (default: as time allows)")
    add("--growth", action="store_true", help="the curve of time and memory against T, alone")
    add("--quick", action="store_true", help="tiny sizes, one dtype, two rounds: does all run?")
    made.add_common("--device")
    add("--csv", metavar="FILE", help="write the rows here, after every group")
    made.add_common("--plots")
    add("--budget-minutes", metavar="M", help="start no further group after this long")
    made.add_common("--no-memory")
    return made


def parse(arguments: list[str]) -> Options:
    """Options of the command line, checked."""
    given = parser().parse_args(arguments)
    device = choose_device(given.device)
    modes = choose_names("--modes", given.modes, MODES)
    usual = suite.DTYPES[device][: 1 if given.quick else None]
    dtypes = choose_names("--dtypes", given.dtypes, tuple(DTYPES)) or usual
    operations = choose_names("--ops", given.ops, tuple(OPERATIONS)) or tuple(OPERATIONS)
    selection = Selection.of(given, contender_names())
    output = Output.of(given, "kernels")
    repeats = None if given.repeats is None else whole("--repeats", given.repeats)
    minutes = given.budget_minutes
    groups = _groups(given, operations, device, dtypes, modes)
    return Options(
        groups=_inhabited(groups, selection),
        selection=selection,
        output=output,
        repeats=repeats or (2 if given.quick else None),
        budget_minutes=None if minutes is None else positive("--budget-minutes", minutes),
        memory=not given.no_memory,
    )


def _inhabited(groups: list[Group], selection: Selection) -> tuple[Group, ...]:
    """Groups with a contender among those chosen."""
    found = tuple(
        group
        for group in groups
        if any(selection.chosen(contender.name) for contender in OPERATIONS[group.op].contenders)
    )
    if not found:
        raise selection.nobody()
    return found


def _groups(given, operations, device: str, dtypes, modes) -> list[Group]:
    if given.quick and (given.shape or given.tokens or given.growth):
        which = next(n for n in ("shape", "tokens", "growth") if getattr(given, n))
        raise UserError(f"--quick chooses its own sizes: leave out --{which} or --quick")
    if given.growth and "linear_logp" not in operations:
        raise UserError(f"--growth is about linear_logp, which --ops {given.ops} leaves out")
    head = _head(given.shape) if given.shape else None
    parts = given.tokens.split(",") if given.tokens else []
    tokens = [whole("--tokens", part) for part in parts]
    usual_head, usual_tokens = suite.CURVE[device]
    points = [suite.QUICK] if given.quick else suite.POINTS[device]
    if head or tokens:
        one = head or suite.POINTS[device][0][1]
        points = [(T, one, MODES) for T in tokens or [suite.TOKENS[device]]]
    chosen_sizes = given.quick or head or tokens
    groups = []
    for operation in (OPERATIONS[name] for name in operations):
        common = operation, device, dtypes, modes
        if not given.growth:
            groups += suite.points(*common, points)
        if given.growth or (device == "cuda" and not chosen_sizes):
            groups += suite.curve(*common, head or usual_head, tokens or usual_tokens)
    if not groups:
        raise UserError(f"--modes {given.modes}: none of {', '.join(operations)} has such a mode")
    return groups


def choose_names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The known names in a list, each once; () where the option is not given."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{option} {name}: {remedy}")
    return tuple(dict.fromkeys(names))


def _head(text: str) -> tuple[int, int]:
    if text in suite.HEADS:
        return suite.HEADS[text]
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    close = difflib.get_close_matches(text, suite.HEADS, 1)
    remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(suite.HEADS)}, or D,V"
    raise UserError(f"--shape {text}: {remedy}")
