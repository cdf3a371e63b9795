"""Distributions as SVG: stepped areas over bins of one width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_fast.numbers import number, percent
from dpo_fast.report.frame import BOTTOM, TOP, WIDE, Frame, write
from dpo_fast.report.markup import text

BINS = 40  # at most about as many
LETTER = 7.0  # about the width of one in a label
FAR = 4.0  # times the distance of inner quantiles: what lies beyond goes into the last bin


@dataclass
class Part:
    """One distribution. tone: as of a curve. counts: of every bin."""

    name: str
    tone: str
    counts: Sequence[int]


@dataclass
class Histogram:
    """Distributions over the same bins.

    first, width: where the first bin begins, and how wide each is.
    open_below, open_above: the bin at that end holds all that lies beyond it, too.
    across: what is counted by. of: what is counted.
    whole: bins hold whole numbers.
    """

    title: str
    note: str
    parts: list[Part]
    first: float
    width: float
    across: str
    of: str
    open_below: bool = False
    open_above: bool = False
    whole: bool = False


def edges(values: Sequence[float]) -> tuple[float, float, int]:
    """First edge, width and number of bins for sorted values. Edges are round, and 0 is one of them."""
    low, high = values[0], values[-1]
    inner = [values[int(share * (len(values) - 1))] for share in (0.05, 0.95)]
    reach = FAR * (inner[1] - inner[0])
    if reach > 0:
        low, high = max(low, inner[0] - reach), min(high, inner[1] + reach)
    rough = (high - low) / BINS or abs(high) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    first = math.floor(low / width + 1e-9)
    return first * width, width, max(1, math.floor(high / width + 1e-9) - first + 1)


def count(values: Sequence[float], first: float, width: float, bins: int) -> list[int]:
    """Values in each bin; those beyond an end are in the bin there."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, math.floor((value - first) / width + 1e-9)))] += 1
    return counts


def draw_histogram(histogram: Histogram) -> str:
    """The SVG: shares of each distribution, so that those of unequal size compare."""
    bins = len(histogram.parts[0].counts)
    shares = [_shares(part.counts) for part in histogram.parts]
    last = histogram.first + bins * histogram.width
    high = 1.1 * max((max(each) for each in shares), default=1.0) or 1.0
    frame = Frame(histogram.first, last, 0.0, high, WIDE)
    parts = [frame.axes(histogram.across, f"of {histogram.of}", percent=True)]
    if histogram.first < 0 < last:
        parts.append(frame.upright(0.0, "rule", ""))
    parts += [_area(part, each, histogram, frame) for part, each in zip(histogram.parts, shares)]
    if len(histogram.parts) > 1:
        parts += _names(histogram.parts, frame)
    return frame.svg(histogram.title, "".join(parts))


def _names(parts: Sequence[Part], frame: Frame) -> list[str]:
    """The names of a few distributions in their colours; those of runs are in the legend of the page."""
    written, x = [], frame.right
    for part in reversed([part for part in parts if not part.tone.startswith("run-")]):
        written.append(write(x, TOP - 11, part.name, f"label {part.tone}", "end"))
        x -= LETTER * (len(part.name) + 2)
    return written


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _area(part: Part, shares: Sequence[float], histogram: Histogram, frame: Frame) -> str:
    """A stepped outline, filled; with the words of every bin for the hover read-out."""
    places = [f"{frame.x(histogram.first):.1f},{BOTTOM}"]
    for index, share in enumerate(shares):
        left = histogram.first + index * histogram.width
        ends = ((left, share), (left + histogram.width, share))
        places.append(frame.place(ends))
    places.append(f"{frame.x(frame.last):.1f},{BOTTOM}")
    words = "|".join(f"{count:,} ({percent(share)})" for count, share in zip(part.counts, shares))
    return (
        f'<g class="area {part.tone}" data-name="{text(part.name)}" data-bins="{text(words)}" '
        f'data-ranges="{text("|".join(_ranges(histogram, len(shares))))}">'
        f'<polygon points="{" ".join(places)}"/></g>'
    )


def _ranges(histogram: Histogram, bins: int) -> list[str]:
    """What each bin holds, in words."""
    found = []
    for index in range(bins):
        low = histogram.first + index * histogram.width
        high = low + histogram.width
        if histogram.whole:
            low, high = f"{low:,.0f}", f"{high - 1:,.0f}"
        else:
            low, high = number(low), number(high)
        if index == 0 and histogram.open_below:
            found.append(f"below {high}")
        elif index == bins - 1 and histogram.open_above:
            found.append(f"{low} or more")
        else:
            found.append(low if low == high else f"{low} to {high}")
    return found
