"""How many tokens rows have: prompts, and the answers that continue them, as many as each row has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpo_fast.data.kinds import COMPLETIONS, Kind


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
