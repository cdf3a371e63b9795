"""Rows of `bench kernels`: their columns, and how they are made from the lines of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.kernels import meters
from benchmarks.kernels.case import MODES, Case, Operation
from benchmarks.kernels.lines import Key, Segment, call_name, segments
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.machine import Times, summary
from benchmarks.results import Columns

BARE, COPY = "bare products", "copy"
CUT = "not timed: the run was cut short"
NAMES = (
    "op impl mode T D V dtype ms_p20 ms_p50 ms_p80 peak_mib flops bytes tflops gbps x_of_bare_gemm "
    "max_err device capability torch triton driver commit date schedule products err_logp "
    "err_sequence threads rounds package note"
)
NUMBERS = (
    "T D V ms_p20 ms_p50 ms_p80 peak_mib flops bytes tflops gbps x_of_bare_gemm max_err products "
    "err_logp err_sequence rounds"
)
COLUMNS = Columns.of(NAMES, NUMBERS)
CHECKED = ("package", "max_err", "err_logp", "err_sequence", "schedule", "products")


@dataclass
class Outcome:
    """What came of a setting, or of a whole run.

    refusals: (contender, reason) for contenders that cannot run here.
    spare: names of spare contenders that were not asked for.
    unreached: what no time was left for.
    failures: what is wrong. A run with any exits with 1.
    """

    rows: list[dict] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, lines: list[dict]) -> Outcome:
        found, parts = cls(rows=rows_of(lines)), segments(lines)
        found.refusals = [(x["impl"], x["reason"]) for x in lines if x.get("line") == "missing"]
        found.spare = [x["impl"] for x in lines if x.get("line") == "spare"]
        reached = {
            (part.place, name)
            for part in parts
            for name, one in _by_name(_rows(part)).items()
            if one["note"] != CUT
        }
        last = {part.place: part for part in parts}
        for place, part in last.items():
            names = [name for name in part.who if (place, name) not in reached]
            found.unreached += [
                f"{call_name(*name)}, {part.setting.case(name[1])}" for name in names
            ]
            if part.lost:
                found.failures.append(f"{part.setting}: {part.lost}")
        for part in parts:
            for (impl, mode), why in part.failed.items():
                found.failures.append(f"{call_name(impl, mode)}, {part.case(mode)}: {why}")
        return found


def row(case: Case, impl: str, **values) -> dict:
    """A row with every column, empty where no value is given."""
    base = {name: getattr(case, name) for name in ("op", "mode", "T", "dtype")}
    base |= {"D": case.D or "", "V": case.V or "", "impl": impl}
    return COLUMNS.row(base | values)


def rows_of(lines: Iterable[dict]) -> list[dict]:
    """The rows that the lines allow, setting by setting.

    Of a contender that was measured twice on one machine the later row stands, unless it was cut short.
    """
    settings: dict[tuple, dict[Key, dict]] = {}
    for segment in segments(lines):
        rows = settings.setdefault(segment.place, {})
        for name, found in _by_name(_rows(segment)).items():
            if name not in rows or found["note"] != CUT:
                rows[name] = found
    return [
        found
        for place, rows in settings.items()
        for found in sorted(rows.values(), key=lambda row: _rank(place[0], row))
    ]


def done(lines: Iterable[dict]) -> dict[tuple, list[tuple[str, Key]]]:
    """What need not be measured again, by a setting's sizes: device's name, contender and mode.

    That is what has its rounds, or a reason why it never will.
    """
    found: dict[tuple, list[tuple[str, Key]]] = {}
    for segment in segments(lines):
        for name, one in _by_name(_rows(segment)).items():
            final = one["rounds"] != "" and one["rounds"] >= segment.least
            if name[0] not in (BARE, COPY) and (final or one["note"] not in ("", CUT)):
                here = found.setdefault(segment.setting.sizes, [])
                here.append((segment.environment["device"], name))
    return found


def _by_name(rows: list[dict]) -> dict[Key, dict]:
    return {(one["impl"], one["mode"]): one for one in rows}


def _rank(op: str, found: dict) -> tuple[int, int]:
    """Place of a row: the ceilings first, then the operation's own order of contenders."""
    order = [COPY, BARE, *(c.name for c in OPERATIONS[op].contenders)]
    place = order.index(found["impl"]) if found["impl"] in order else len(order)
    return place, MODES.index(found["mode"]) if found["mode"] else 0


def _rows(segment: Segment) -> list[dict]:
    operation = OPERATIONS[segment.setting.op]
    found = _ceilings(segment, operation) if segment.rounds else []
    for name in dict.fromkeys([*segment.checks, *segment.notes]):
        impl, mode = name
        case, check = segment.case(mode), segment.checks.get(name, {})
        values = {column: check.get(column, "") for column in CHECKED}
        products = values.pop("products")
        values |= {"note": segment.notes.get(name, ""), "peak_mib": segment.peaks.get(name)}
        series = segment.series(call_name(impl, mode))
        if not values["note"] and series:
            bare_ms = summary(bare(operation, case, products, segment.rounds)).p50 or None
            work = operation.work(case, products)
            values |= timed(summary(series), *work, bare_ms)
            values |= {"rounds": len(series), "products": products}
        elif not values["note"]:
            values["note"] = CUT
        found.append(row(case, impl, **segment.environment | values))
    return found


def timed(times: Times, flops: float, moved: float, bare_ms: float | None) -> dict:
    """The columns of a time in milliseconds and of the work counted for it."""
    values = {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80}
    values |= {"flops": round(flops), "bytes": round(moved), "gbps": moved / times.p50 / 1e6}
    if flops:
        values["tflops"] = flops / times.p50 / 1e9
    if bare_ms:
        values["x_of_bare_gemm"] = times.p50 / bare_ms
    return values


def bare(operation: Operation, case: Case, count: float, rounds: list[dict]) -> list[float]:
    """Milliseconds of the bare products of a schedule of `count` products, by round."""
    parts = operation.needed(case, count)
    return [sum(times * ms[name] for name, times in parts.items()) for ms in rounds]


def _ceilings(segment: Segment, operation: Operation) -> list[dict]:
    """Rows of the copy, and of the bare products of each mode."""
    setting, shared = segment.setting, segment.environment | {"rounds": len(segment.rounds)}
    moved = 2.0 * meters.COPY_BYTES[setting.device]
    values = shared | timed(summary(segment.series(COPY)), 0.0, moved, None)
    found = [row(setting.case(setting.modes[0]), COPY, **values | {"mode": ""})]
    for mode in setting.modes:
        case, count = setting.case(mode), operation.least[mode]
        if operation.needed(case, count):
            times = summary(bare(operation, case, count, segment.rounds))
            values = timed(times, *operation.work(case, count), times.p50)
            found.append(row(case, BARE, **shared | values | {"products": count}))
    return found
