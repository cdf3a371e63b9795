"""Every tile that `rows` will time, compiled and run once: several at a time, before anything is timed."""

from __future__ import annotations

import functools

from benchmarks.gpu import rows


def items(rehearse: bool) -> dict:
    found = rows.passes(rehearse)
    return {name: functools.partial(rows.check, *what) for name, what in found.items()}
