"""Ticks at round numbers, and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo_fast.numbers import exponent, minus


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """At most `count` + 1 round numbers, 1, 2 or 5 times a power of ten apart, within [low, high].

    `whole` keeps them whole numbers. There is at least one where high > low.
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)] or [low]


def tick_labels(values: Sequence[float]) -> list[str]:
    """All with as many decimals as their distance needs; 12k for thousands, 5e-7 for tiny ones."""
    largest = max(map(abs, values), default=0.0)
    step = min((b - a for a, b in zip(values, values[1:])), default=largest or 1.0)
    if 0 < largest < 1e-3 or largest >= 1e9:
        return [minus(exponent(f"{value:.3g}")) for value in values]
    unit, suffix = (1e6, "M") if largest >= 2e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9)) if step > 0 else 0
    return [minus(f"{value / unit:.{decimals}f}") + (suffix if value else "") for value in values]
