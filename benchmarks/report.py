"""What a run says in words: what it is doing, who is missing, what failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from benchmarks import memory


class Progress:
    """A line on stderr for everything that is begun, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(self.since(line), file=sys.stderr, flush=True)

    def since(self, line: str) -> str:
        return f"  {time.monotonic() - self.start:4.0f} s  {line}"


def tell_missing(refusals: Iterable[tuple[str, str]]) -> None:
    """Of (contender, reason): a line for every reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refusals:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"missing: {'; '.join(names)}: {reason}", flush=True)


def tell_failures(failures: list[str]) -> int:
    """The exit code of a run in which these are wrong."""
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def note(error: Exception, most: int) -> tuple[str, bool]:
    """What the row of a contender says that raised, at most so many characters of the message; and
    whether it fails the run where the contender is ours: not if memory ran out."""
    if memory.is_full(error):
        return "out of memory", False
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:most]}", True
