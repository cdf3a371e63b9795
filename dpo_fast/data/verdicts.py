"""Verdicts against a row, bad or too long, and their tally."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from dpo_fast.errors import UserError
from dpo_fast.wording import clipped, printable

EXAMPLES_KEPT = 50
KINDS_KEPT, OTHERS = 200, "other faults"
LONGEST_DETAIL = 600  # characters
DEFAULT_ROW_BYTES = 1 << 20


class Verdict(ValueError):
    """Why a row is not used.

    fault: in words; it may name one completion of a group, as in `scores[1]`.
    kind: the fault without such a number, the same for all rows with this fault.
    detail: about the one row.
    """

    def __init__(self, fault: str, detail: str = "") -> None:
        # Both may quote the row, which may hold anything at any length.
        fault, detail = clipped(printable(fault)), clipped(printable(detail), LONGEST_DETAIL)
        super().__init__(fault, detail)
        self.kind = re.sub(r"\[\d+\]", "", fault)
        self.fault = fault
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.fault}: {self.detail}" if self.detail else self.fault


class BadRow(Verdict):
    """The row cannot be used: a mistake in the data."""


class Dropped(Verdict):
    """The row is in order, but nothing of it can be trained on: equal answers, an empty one, no room."""


@dataclass
class Tally:
    """Verdicts counted by kind, with the first rows of each kind.

    `rows[kind]` holds at most 50 (where, message) pairs; `counts[kind]` counts them all.
    """

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, where: str, kind: str, message: str) -> None:
        if kind not in self.counts and len(self.counts) >= KINDS_KEPT:
            kind = OTHERS  # kinds may quote the rows, as in "unknown role 'x'"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        kept = self.rows.setdefault(kind, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append((where, message))

    def update(self, other: Tally) -> None:
        """Add the verdicts of another tally."""
        for kind, count in other.counts.items():
            known = kind in self.counts or len(self.counts) < KINDS_KEPT
            self._merge(kind if known else OTHERS, count, other.rows.get(kind, []))

    def _merge(self, kind: str, count: int, rows: list[tuple[str, str]]) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.rows.setdefault(kind, [])
        kept += rows[: EXAMPLES_KEPT - len(kept)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __iter__(self):
        """All the kept (where, message) pairs, kind by kind."""
        return (row for rows in self.rows.values() for row in rows)


class BadRows(Tally):
    """A tally that stops at the first bad row, unless told to skip them.

    max_row_bytes: a row of more is bad, which a reader tells before it has all of it.
    ignored: columns that are left out (data.ignore_columns), whatever is wrong with them.
    """

    ignored: Collection[str] = ()

    def __init__(self, on_bad_row: str, max_row_bytes: int = DEFAULT_ROW_BYTES) -> None:
        super().__init__()
        self.on_bad_row, self.max_row_bytes = on_bad_row, max_row_bytes

    def reject(self, where: str, verdict: BadRow) -> None:
        """Counts the row; raises UserError when data.on_bad_row=error."""
        if self.on_bad_row == "error":
            raise bad_row_error(where, verdict)
        self.add(where, verdict.kind, str(verdict))


def bad_row_error(where: str, verdict: Verdict) -> UserError:
    """The error that stops the run at a bad row, with the remedy."""
    reason = str(verdict)
    end = "" if reason.endswith("?") else "."
    return UserError(f"{where}: {reason}{end} Mend the row, or set data.on_bad_row=skip")
