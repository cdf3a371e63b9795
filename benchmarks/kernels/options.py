"""The sizes and the options of `bench kernels`."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

from benchmarks import jsonl
from benchmarks.cli import Parser, Selection, choose_device, positive, whole
from benchmarks.kernels.case import MODES, Operation, Setting
from benchmarks.kernels.lines import segments
from benchmarks.kernels.operations import OPERATIONS, add, contender_names
from benchmarks.machine import DTYPES
from benchmarks.results import Output
from dpo_fast.errors import UserError

HEADS = {  # D, V
    "llama3": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "gemma3-1b": (1152, 262144),
    "mistral": (4096, 32768),
    "cpu": (896, 32000),  # a head that two cores multiply in a second
    "tiny": (64, 2000),
}
# Points: tokens, head, modes. The last one of a GPU is about memory: logits of 19 GiB in bf16.
POINTS = {
    "cpu": ((2048, HEADS["cpu"], MODES),),
    "cuda": (
        (8192, HEADS["llama3"], MODES),
        (16384, HEADS["qwen2.5-0.5b"], MODES),
        (65536, (4096, 151936), ("trainable",)),
    ),
}
USUAL_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
CURVE = {  # head, and two decades of tokens or nearly so, in powers of 2
    "cpu": ((256, 8192), tuple(2**n for n in range(7, 15))),
    "cuda": (HEADS["qwen2.5-1.5b"], tuple(2**n for n in range(10, 17))),
}
TOKENS = {"cpu": 2048, "cuda": 8192}  # for a head chosen without tokens
MOST_LOGITS = 1 << 31  # elements of given logits
QUICK = (128, HEADS["tiny"], MODES)


def at_points(operation: Operation, device: str, dtypes, modes, points) -> list[Setting]:
    """A setting for each point and dtype, in those of the modes that the operation has."""
    settings = {}
    for T, (D, V), own in points:
        wanted = tuple(m for m in operation.modes if m in own and m in (modes or MODES))
        # Given logits are only read: beyond some GiB there is nothing new to see.
        if not wanted or (operation.sizes == "TV" and T * V > MOST_LOGITS):
            continue
        sizes = (D if "D" in operation.sizes else 0, V if "V" in operation.sizes else 0)
        for dtype in operation.dtypes or dtypes:
            settings[Setting(operation.name, T, *sizes, dtype, device, wanted)] = None
    return list(settings)


def along_tokens(operation: Operation, device: str, dtypes, modes, head, tokens) -> list[Setting]:
    """A setting for each T and dtype: a trainable head, unless modes say otherwise."""
    if operation.sizes != "TDV":
        return []
    return [
        Setting(operation.name, T, *head, dtype, device, modes or ("trainable",), growth=True)
        for dtype in dtypes
        for T in tokens
    ]


TIMEOUT = {"cpu": 600.0, "cuda": 120.0}  # a first call may compile for a minute
USUAL_TIMEOUT = f"(default: {TIMEOUT['cuda']:.0f} on a GPU, {TIMEOUT['cpu']:.0f} on a CPU)"
USAGE = """measure every implementation of the loss head, and of the operations round it, in one run

By default: on a GPU the points of the targets and the curve against T, in bf16; on a CPU one point
(T 2048, D 896, V 32000) in fp32 and bf16. Lists are separated by commas."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the rows go.

    settings: the most telling ones first.
    minutes: None for as many as it takes.
    lines: the file of the lines; None keeps none.
    resume: it has lines already.
    timeout: seconds that a step of a contender may take.
    isolated: in a process that may be lost.
    """

    settings: tuple[Setting, ...]
    selection: Selection
    output: Output
    repeats: int | None
    minutes: float | None
    memory: bool
    lines: Path | None
    resume: bool
    timeout: float
    isolated: bool


def parser() -> argparse.ArgumentParser:
    made = Parser("bench kernels", USAGE)
    add = made.add_argument
    add("--ops", metavar="NAMES", help=f"operations: {', '.join(OPERATIONS)} (default: all)")
    add("--shape", metavar="HEAD", help=f"{', '.join(HEADS)}, or D,V as in 896,32000")
    add("--tokens", metavar="T,...", help="scored tokens; with --growth the curve's")
    add("--modes", metavar="NAMES", help=f"{', '.join(MODES)} (default: all)")
    add("--dtypes", metavar="NAMES", help=f"{', '.join(DTYPES)}")
    made.add_common("--only", "--skip")
    add("--repeats", metavar="N", help="rounds, each contender once (default: as time allows)")
    add("--growth", action="store_true", help="the curve of time and memory against T, alone")
    add("--quick", action="store_true", help="tiny sizes, one dtype, two rounds: does all run?")
    made.add_common("--device")
    add("--csv", metavar="FILE", help="write the rows here, after every setting")
    made.add_common("--plots")
    made.add_common("--no-memory")
    add("--jsonl", metavar="FILE", help="a line here for every check and every round, at once")
    add("--resume", metavar="FILE", help="leave out what this file of lines has, and add to it")
    add("--minutes", metavar="M", help="end after this long; the most telling sizes come first")
    add("--timeout", metavar="S", help=f"seconds a contender's step may take {USUAL_TIMEOUT}")
    add("--one-process", action="store_true", help="measure in this process, for a debugger")
    add("--contenders", metavar="MODULE", action="append", help="also those of its CONTENDERS")
    return made


def parse(arguments: list[str]) -> Options:
    """Options of the command line, checked."""
    given = parser().parse_args(arguments)
    for module in given.contenders or ():
        add(module)
    device = choose_device(given.device)
    modes = choose_names("--modes", given.modes, MODES)
    usual = USUAL_DTYPES[device][: 1 if given.quick else None]
    dtypes = choose_names("--dtypes", given.dtypes, tuple(DTYPES)) or usual
    operations = choose_names("--ops", given.ops, tuple(OPERATIONS)) or tuple(OPERATIONS)
    selection = Selection.of(given, contender_names())
    output = Output.of(given, "kernels")
    repeats = None if given.repeats is None else whole("--repeats", given.repeats)
    minutes, timeout = given.minutes, given.timeout
    lines = _lines(given)
    # Points come before curves: a budget may end the run.
    settings = sorted(_settings(given, operations, device, dtypes, modes), key=lambda s: s.growth)
    return Options(
        settings=_inhabited(settings, selection),
        selection=selection,
        output=output,
        repeats=repeats or (2 if given.quick else None),
        minutes=None if minutes is None else positive("--minutes", minutes),
        memory=not given.no_memory,
        lines=lines,
        resume=given.resume is not None,
        timeout=TIMEOUT[device] if timeout is None else positive("--timeout", timeout),
        isolated=not given.one_process,
    )


def _lines(given) -> Path | None:
    """The file of the lines: one that is there for --resume, a new one for --jsonl."""
    if given.one_process and given.minutes:
        raise UserError("--one-process has nobody to end it after --minutes: leave out one of them")
    if given.one_process and given.timeout:
        raise UserError("--one-process has nobody to wait with --timeout: leave out one of them")
    if given.resume is None:
        path = Path(given.jsonl) if given.jsonl else None
        if path and path.exists():
            raise UserError(f"--jsonl {path} is there: add to it with --resume {path}, or move it")
        return path
    path = Path(given.resume)
    if given.jsonl and Path(given.jsonl) != path:
        raise UserError(f"--resume {path} adds to its own file: leave out --jsonl {given.jsonl}")
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file; --jsonl {path} begins one")
    if not segments(jsonl.read(path)):
        raise UserError(
            f"--resume {path}: no lines of bench kernels: name a file that --jsonl made"
        )
    return path


def _inhabited(settings: list[Setting], selection: Selection) -> tuple[Setting, ...]:
    """Settings that have a chosen contender."""
    found = tuple(
        setting
        for setting in settings
        if any(selection.chosen(contender.name) for contender in OPERATIONS[setting.op].contenders)
    )
    if not found:
        raise selection.nobody()
    return found


def _settings(given, operations, device: str, dtypes, modes) -> list[Setting]:
    if given.quick and (given.shape or given.tokens or given.growth):
        which = next(n for n in ("shape", "tokens", "growth") if getattr(given, n))
        raise UserError(f"--quick chooses its own sizes: leave out --{which} or --quick")
    if given.growth and "linear_logp" not in operations:
        raise UserError(f"--growth is about linear_logp, which --ops {given.ops} leaves out")
    head = _head(given.shape) if given.shape else None
    parts = given.tokens.split(",") if given.tokens else []
    tokens = [whole("--tokens", part) for part in parts]
    usual_head, usual_tokens = CURVE[device]
    points = [QUICK] if given.quick else POINTS[device]
    if head or tokens:
        one = head or POINTS[device][0][1]
        points = [(T, one, MODES) for T in tokens or [TOKENS[device]]]
    chosen_sizes = given.quick or head or tokens
    settings = []
    for operation in (OPERATIONS[name] for name in operations):
        common = operation, device, dtypes, modes
        if not given.growth:
            settings += at_points(*common, points)
        if given.growth or (device == "cuda" and not chosen_sizes):
            settings += along_tokens(*common, head or usual_head, tokens or usual_tokens)
    if not settings:
        raise UserError(f"--modes {given.modes}: none of {', '.join(operations)} has such a mode")
    return settings


def choose_names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a comma-separated list, each once; () if the option is not given."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{option} {name}: {remedy}")
    return tuple(dict.fromkeys(names))


def _head(text: str) -> tuple[int, int]:
    if text in HEADS:
        return HEADS[text]
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    close = difflib.get_close_matches(text, HEADS, 1)
    remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(HEADS)}, or D,V"
    raise UserError(f"--shape {text}: {remedy}")
