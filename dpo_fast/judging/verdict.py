"""What a judge says of one completion, and when failures are too many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_fast.errors import UserError
from dpo_fast.judging.samples import SampleRow
from dpo_fast.wording import clipped, printable, quoted

SCORED, REFUSED, UNPARSABLE, FAILED = "scored", "refused", "unparsable", "failed"
WORDS = (SCORED, REFUSED, UNPARSABLE, FAILED)
LONGEST_REASON = 300
MORE_TIME = "judge.timeout_seconds and judge.max_retries give it more time and tries."


@dataclass(frozen=True)
class Verdict:
    """score: higher is better; None unless word is `scored`.

    word: `scored`; `refused`, the judge gives none; `unparsable`, its answer is no score; `failed`, it
        crashed or took too long.
    why: the reason, where there is no score.
    """

    score: float | None
    word: str = SCORED
    why: str = ""

    @classmethod
    def without(cls, word: str, why: str = "") -> Verdict:
        return cls(None, word, clipped(printable(why), LONGEST_REASON))


def verdict_of(value: Any) -> Verdict:
    """A judge's answer for one completion: a number, true or false, or null for a refusal."""
    if value is None:
        return Verdict.without(REFUSED, "null")
    if not isinstance(value, (int, float)):
        return Verdict.without(UNPARSABLE, f"{quoted(value)} is no number")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        return Verdict.without(UNPARSABLE, f"{value!r:.40} is not finite")
    return Verdict(score)


@dataclass
class Judged:
    """The verdicts on the completions of a row. facts: counts for the report, by name."""

    verdicts: list[Verdict]
    facts: Counter = field(default_factory=Counter)


class Judge(Protocol):
    """Scores completions.

    together: rows that are judged together, since the numbers may depend on a batch's other texts.
    """

    together: int

    def __call__(self, chunks: Iterable[list[SampleRow]]) -> Iterator[list[Judged]]:
        """What is said of every row of every chunk, in their order."""
        ...

    def close(self) -> None: ...


class Failures:
    """Counts failures in a row. One of many is kept apart; too many end the command.

    remedy: for failures. reading: for answers that are no score; by default the same.
    """

    def __init__(self, most: int, name: str, remedy: str, reading: str = "") -> None:
        self.most, self.name, self.remedy, self.reading = most, name, remedy, reading
        self.in_a_row = 0

    def note(self, row: SampleRow, judged: Judged, by_row: bool = False) -> None:
        """Raises UserError with the last reason where the latest `most` answers all failed.

        by_row: one answer is for all completions of a row.
        """
        for verdict in judged.verdicts[:1] if by_row else judged.verdicts:
            if verdict.word in (SCORED, REFUSED):
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            if self.in_a_row >= self.most:
                times = "" if self.most == 1 else f" {self.in_a_row} times in a row"
                word, remedy = "failed", self.remedy
                if verdict.word != FAILED:
                    word, remedy = "gave no score", self.reading or remedy
                raise UserError(
                    f"{self.name} {word}{times} (judge.max_failures={self.most}), at last for {row.where}: "
                    f"{verdict.why.rstrip('.')}. {remedy} What was judged before is kept: the same command "
                    "goes on after it"
                )
