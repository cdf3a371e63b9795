"""Numbers as people write them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three or four digits that count: 0.6931, 71.7, 1,848, 2.5e-7."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        return minus(exponent(f"{value:.2e}").replace(".00e", "e").replace("0e", "e"))
    decimals = 4 - min(4, max(0, math.floor(math.log10(size)) + 1))
    return minus(f"{value:,.{decimals}f}")


def percent(value: float) -> str:
    """50 %, 99.4 %; no rounding up to 100 %, none down to 0 %."""
    text = f"{100 * value:.1f}"
    if text == "100.0" and value < 1:
        text = "99.9"
    elif text == "0.0" and value > 0:
        return "<0.1 %"
    return minus(text.removesuffix(".0")) + " %"


def exponent(text: str) -> str:
    """A power of ten without the zeros that Python writes."""
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def minus(text: str) -> str:
    """The minus sign of print; none before a zero."""
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]
    return text.replace("-", MINUS)
