"""The options of `bench kernels`. One that cannot be honoured is an error that names it, its value and
the remedy; nothing is ignored."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import fnmatch
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.case import DTYPES, MODES
from benchmarks.measure import Group
from benchmarks.registry import OPERATIONS, contender_names
from dpo_fast.errors import UserError

USAGE = """measure every implementation of the loss head, and of the operations round it, in one run

By default: on a GPU the points of the targets and the curve against T, in bf16; on a CPU one point
(T 2048, D 896, V 32000) in fp32 and bf16. Lists are separated by commas."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the rows go."""

    groups: tuple[Group, ...]
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    repeats: int | None = None
    csv: Path | None = None
    plots: Path | None = None
    budget_minutes: float | None = None
    memory: bool = True

    def asked(self, name: str) -> bool:
        """By its name: a pattern does not call in what takes minutes."""
        return name in self.only

    def chosen(self, name: str) -> bool:
        wanted = not self.only or any(fnmatch.fnmatchcase(name, p) for p in self.only)
        return wanted and not any(fnmatch.fnmatchcase(name, p) for p in self.skip)


class Parser(argparse.ArgumentParser):
    """Mistakes are a UserError, as everywhere."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the options")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        "bench kernels", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--ops", metavar="NAMES", help=f"operations: {', '.join(OPERATIONS)} (default: all)")
    add("--shape", metavar="HEAD", help=f"{', '.join(suite.HEADS)}, or D,V as in 896,32000")
    add("--tokens", metavar="T,...", help="scored tokens; with --growth the curve's")
    add("--modes", metavar="NAMES", help=f"{', '.join(MODES)} (default: all)")
    add("--dtypes", metavar="NAMES", help=f"{', '.join(DTYPES)}")
    add("--only", metavar="NAME", action="append", help="these contenders; * matches any text")
    add("--skip", metavar="NAME", action="append", help="without these contenders")
    add("--repeats", metavar="N", help="rounds, each contender once (default: as time allows)")
    add("--growth", action="store_true", help="the curve of time and memory against T, alone")
    add("--quick", action="store_true", help="tiny sizes, one dtype, two rounds: does all run?")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--csv", metavar="FILE", help="write the rows here, after every group")
    add("--plots", metavar="FOLDER", help="draw the rows here; without --csv keep them here too")
    add("--budget-minutes", metavar="M", help="start no further group after this long")
    add("--no-memory", action="store_true", help="leave out the peak memory")
    return made


def parse(arguments: list[str]) -> Options:
    """Options of the command line, checked."""
    given = parser().parse_args(arguments)
    device = choose_device(given.device)
    modes = choose_names("--modes", given.modes, MODES)
    usual = suite.DTYPES[device][: 1 if given.quick else None]
    dtypes = choose_names("--dtypes", given.dtypes, tuple(DTYPES)) or usual
    operations = choose_names("--ops", given.ops, tuple(OPERATIONS)) or tuple(OPERATIONS)
    only, skip = (
        patterns(f"--{n}", getattr(given, n), contender_names()) for n in ("only", "skip")
    )
    if given.plots and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plots {given.plots} needs matplotlib: pip install matplotlib")
    repeats = None if given.repeats is None else whole("--repeats", given.repeats)
    options = Options(
        groups=tuple(_groups(given, operations, device, dtypes, modes)),
        only=only,
        skip=skip,
        repeats=repeats or (2 if given.quick else None),
        csv=_csv(given),
        plots=Path(given.plots) if given.plots else None,
        budget_minutes=_minutes(given.budget_minutes),
        memory=not given.no_memory,
    )
    return dataclasses.replace(options, groups=_inhabited(options))


def _inhabited(options: Options) -> tuple[Group, ...]:
    """Groups with a contender among those chosen."""
    groups = tuple(
        group
        for group in options.groups
        if any(options.chosen(contender.name) for contender in OPERATIONS[group.op].contenders)
    )
    if not groups:
        raise UserError(
            f"--only {' '.join(options.only) or '*'} --skip {' '.join(options.skip) or 'nothing'} "
            "leave no contender: choose others"
        )
    return groups


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


def choose_device(name: str | None) -> str:
    there = torch.cuda.is_available()
    if name is None:
        return "cuda" if there else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu or cuda")
    if name == "cuda" and not there:
        raise UserError(
            "--device cuda: this torch sees no GPU; install a CUDA build, or choose --device cpu"
        )
    return name


def choose_names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The known names in a list, each once; () where the option is not given."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{option} {name}: {remedy}")
    return tuple(dict.fromkeys(names))


def patterns(
    option: str, given: list[str] | None, known: tuple[str, ...] | list[str]
) -> tuple[str, ...]:
    """Patterns that each match one of the known names. Raises UserError."""
    for pattern in given or ():
        if not fnmatch.filter(known, pattern):
            close = difflib.get_close_matches(pattern, known, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose from: {'; '.join(known)}"
            raise UserError(f"{option} {pattern!r} matches no contender; {remedy}")
    return tuple(given or ())


def whole(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"{option} {text}: expected a whole number, 1 or more")
    return value


def _head(text: str) -> tuple[int, int]:
    if text in suite.HEADS:
        return suite.HEADS[text]
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    close = difflib.get_close_matches(text, suite.HEADS, 1)
    remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(suite.HEADS)}, or D,V"
    raise UserError(f"--shape {text}: {remedy}")


def _csv(given) -> Path | None:
    """Plots are drawn from a file and from nothing else, so there is one."""
    if given.csv:
        return Path(given.csv)
    return Path(given.plots) / "kernels.csv" if given.plots else None


def _minutes(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"--budget-minutes {text}: expected a number greater than 0")
    return value
