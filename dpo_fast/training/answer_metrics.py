"""Numbers about answers: how often they win, how long they are, how much they repeat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Z95 = 1.959964  # two-sided 95 % of a normal distribution


class WinRate(NamedTuple):
    """rate: wins and half of the ties, of `count` comparisons. low, high: its 95 % interval."""

    rate: float
    low: float
    high: float
    count: int


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> WinRate | None:
    """How often the first score is higher. Where one has no score nothing is compared; None for nothing.

    The interval is Wilson's (1927), with a tie as half a win.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    count = len(pairs)
    rate = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / count
    shrink = 1 + Z95**2 / count
    middle = (rate + Z95**2 / (2 * count)) / shrink
    half = Z95 / shrink * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    return WinRate(rate, max(middle - half, 0.0), min(middle + half, 1.0), count)


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Share of the n-grams of words that are different ones, over all texts (arXiv 1510.03055 section 5.4).

    None where no text has n words.
    """
    grams = [
        tuple(words[start : start + n])
        for words in map(str.split, texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None for none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
