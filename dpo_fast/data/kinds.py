"""What a row of the data is: a pair of answers, a completion that is good or bad, or a scored group.

How many tokens rows have: prompts, and the answers that continue them, as many as each row has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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


@dataclass(frozen=True)
class RowLengths:
    """Token counts of R rows with A answers in all, int64.

    prompt_R: of prompts. answers_A: of answers, row by row. counts_R: answers of each row, 1 or more.
    """

    kind: Kind
    prompt_R: np.ndarray
    answers_A: np.ndarray
    counts_R: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[dict], kind: Kind) -> RowLengths:
        """Of rows of token ids, as `collate` takes them."""
        answers = [kind.answer_ids(row) for row in rows]
        sizes = [
            [len(row["prompt_ids"]) for row in rows],
            [len(ids) for each in answers for ids in each],
            list(map(len, answers)),
        ]
        return cls(kind, *(np.array(values, dtype=np.int64) for values in sizes))

    def __len__(self) -> int:
        return len(self.prompt_R)

    @cached_property
    def starts_R(self) -> np.ndarray:
        """Place of each row's first answer in A."""
        return np.cumsum(self.counts_R) - self.counts_R

    @property
    def longest_R(self) -> np.ndarray:
        """Tokens of each row's longest answer."""
        return np.maximum.reduceat(self.answers_A, self.starts_R) if len(self) else self.prompt_R

    @property
    def sums_R(self) -> np.ndarray:
        """Tokens of all of a row's answers."""
        return np.add.reduceat(self.answers_A, self.starts_R) if len(self) else self.prompt_R

    def take(self, rows: Sequence[int] | np.ndarray) -> RowLengths:
        """Of these rows, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        places = ragged_places(self.starts_R[rows], self.counts_R[rows])
        return RowLengths(
            self.kind, self.prompt_R[rows], self.answers_A[places], self.counts_R[rows]
        )

    def columns(self) -> dict[str, np.ndarray]:
        """By name: prompt, and each answer's as many as rows; of groups `completions`, all of them."""
        names, count = self.kind.answers, len(self.kind.answers)
        sides = [self.answers_A] if self.kind.many else self.answers_A.reshape(-1, count).T
        return {"prompt": self.prompt_R, **dict(zip(names, sides))}

    @property
    def compares(self) -> bool:
        """Whether a row has more than one answer."""
        return self.kind != COMPLETIONS


def ragged_places(starts_R: np.ndarray, counts_R: np.ndarray) -> np.ndarray:
    """The places start, start + 1, ... of every row, one row after the other."""
    before_R = np.cumsum(counts_R) - counts_R
    return np.repeat(starts_R - before_R, counts_R) + np.arange(int(counts_R.sum()))
