"""What a row of the data is: a pair of answers, a completion that is good or bad, or a scored group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Kind:
    """name: of many rows; one: of one row. answers: names of the columns that continue the prompt.
    numbers: optional columns of floats. judged: column that says how good the answers are; instead: one
    that may say it in its place. many: whether the one column of answers is a list of them, of any
    length."""

    name: str
    one: str
    answers: tuple[str, ...]
    numbers: tuple[str, ...]
    judged: str | None = None
    instead: str | None = None
    many: bool = False

    @property
    def judges(self) -> set[str]:
        """Names of the columns that say how good the answers are."""
        return {name for name in (self.judged, self.instead) if name}

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the columns of token ids, the prompt's first."""
        return ("prompt_ids", *(f"{answer}_ids" for answer in self.answers))

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Names of the numbers that hold the reference's sums, an answer each; none for many answers."""
        return () if self.many else tuple(f"reference_{answer}_logps" for answer in self.answers)

    def answer_ids(self, row: Mapping) -> list[list[int]]:
        """The token ids of every answer of a row."""
        return list(row[self.ids[1]]) if self.many else [row[name] for name in self.ids[1:]]


NUMBERS = ("weight", "margin", "soft_label")
PAIRS = Kind(
    "pairs",
    "a pair",
    ("chosen", "rejected"),
    (*NUMBERS, "reference_chosen_logps", "reference_rejected_logps"),
)
COMPLETIONS = Kind(
    "completions",
    "a completion with a label",
    ("completion",),
    (*NUMBERS, "reference_completion_logps"),
    judged="label",
)
GROUPS = Kind(
    "groups",
    "a group of completions with scores",
    ("completions",),
    ("weight",),
    judged="scores",
    instead="ranks",
    many=True,
)
KINDS = (PAIRS, COMPLETIONS, GROUPS)


def kind_of(columns: list[str]) -> Kind:
    """The kind of a table of token ids, by its columns."""
    return next(kind for kind in KINDS if kind.ids[1] in columns)


class OneKind:
    """The kind of all rows, which the first one tells."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self._first = ""

    def see(self, where: str, kind: Kind) -> None:
        """Raises UserError if this row is of another kind than those before."""
        if self.kind is None:
            self.kind, self._first = kind, where
        elif kind != self.kind:
            raise UserError(
                f"{where} is {kind.one} and {self._first} is {self.kind.one}: data is one or the other. "
                "Keep them apart, or set data.format to pairs, messages, unpaired or groups and "
                "data.on_bad_row=skip to pass over those of the other kind"
            )
