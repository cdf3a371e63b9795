"""What the scores and the pairs of a judge come to: counts, and whether length decides."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo_fast.judging.pairing import Pair
from dpo_fast.judging.samples import SampleRow
from dpo_fast.judging.verdict import SCORED, WORDS

DISTINCT = 1000  # values that are told apart
REASONS = 5  # kept for each word
ROUNDING = 1e-12  # of a variance, as a share of the mean square


@dataclass
class Moments:
    """Sums for a correlation."""

    count: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, x: float, y: float) -> None:
        self.count += 1
        for index, value in enumerate((x, y, x * x, y * y, x * y)):
            self.sums[index] += value

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where one of the two does not vary."""
        if self.count < 2:
            return None
        x, y, xx, yy, xy = (each / self.count for each in self.sums)
        spread_x, spread_y = xx - x * x, yy - y * y
        if spread_x <= ROUNDING * xx or spread_y <= ROUNDING * yy:
            return None
        return (xy - x * y) / math.sqrt(spread_x * spread_y)


@dataclass
class Tally:
    """Counts of rows, verdicts and pairs."""

    rows: int = 0
    verdicts: Counter = field(default_factory=Counter)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    values: Counter = field(default_factory=Counter)
    several: bool = False  # more values than are told apart
    total: float = 0.0
    unfinished: int = 0
    tied_rows: int = 0
    overall: Moments = field(default_factory=Moments)
    within: Moments = field(default_factory=Moments)
    refused: Counter = field(default_factory=Counter)
    pairs: int = 0
    groups: int = 0
    rows_with_pairs: int = 0
    chosen_longer: int = 0
    chosen_characters: int = 0
    rejected_characters: int = 0
    differences: float = 0.0

    def row(self, row: SampleRow, scores: list, words: list[str], reasons: list[str]) -> None:
        """Count a judged row."""
        self.rows += 1
        self.unfinished += sum(map(row.unfinished, range(len(row.completions))))
        for word, reason in zip(words, reasons):
            self.verdicts[word] += 1
            kept = self.reasons.setdefault(word, [])
            if word != SCORED and len(kept) < REASONS:
                kept.append(f"{row.where}: {reason}")
        known = [(len(t), s) for t, s in zip(row.completions, scores) if s is not None]
        for _, score in known:
            self.total += score
            self.several |= len(self.values) >= DISTINCT
            if not self.several:
                self.values[score] += 1
        self.tied_rows += len(known) > 1 and len({score for _, score in known}) == 1
        self._lengths(known)

    def _lengths(self, known: list[tuple[int, float]]) -> None:
        for length, score in known:
            self.overall.add(length, score)
        if len(known) > 1:
            mean_length, mean_score = (math.fsum(each) / len(known) for each in zip(*known))
            for length, score in known:
                self.within.add(length - mean_length, score - mean_score)

    def pairs_of_row(self, pairs: list[Pair]) -> None:
        """Count the pairs of one prompt."""
        self.pairs += len(pairs)
        self.rows_with_pairs += bool(pairs)
        for pair in pairs:
            chosen, rejected = len(pair.chosen.text), len(pair.rejected.text)
            self.chosen_longer += chosen > rejected
            self.chosen_characters += chosen
            self.rejected_characters += rejected
            self.differences += pair.difference

    @property
    def only_value(self) -> float | None:
        """The score of all completions, where there is only one."""
        return next(iter(self.values)) if len(self.values) == 1 and not self.several else None

    def report(self) -> dict[str, Any]:
        """As judge-report.json has it."""
        scored = self.verdicts[SCORED]
        share = 1 / self.pairs if self.pairs else math.nan
        return {
            "prompts": self.rows,
            "completions": sum(self.verdicts.values()),
            "verdicts": {word: self.verdicts[word] for word in WORDS},
            "reasons": {word: kept for word, kept in self.reasons.items() if kept},
            "unfinished": self.unfinished,
            "prompts_tied": self.tied_rows,
            "mean_score": _finite(self.total / scored if scored else math.nan),
            "distinct_scores": f"{DISTINCT} or more" if self.several else len(self.values),
            "score_length_correlation": _finite(self.overall.correlation),
            "score_length_correlation_within_prompts": _finite(self.within.correlation),
            **({"groups": self.groups} if self.groups else {"pairs": self.pairs}),
            "prompts_with_pairs": self.rows_with_pairs or None,
            "refused": {name: count for name, count in self.refused.items() if count},
            "chosen_longer": _finite(self.chosen_longer * share),
            "chosen_characters": _finite(self.chosen_characters * share),
            "rejected_characters": _finite(self.rejected_characters * share),
            "mean_difference": _finite(self.differences * share),
        }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
