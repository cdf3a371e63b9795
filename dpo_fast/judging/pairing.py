"""Pairs of scored completions, with control of their length."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_fast.data.messages import Messages, say
from dpo_fast.data.prompts import without_prompt
from dpo_fast.judging.config import PairsSection
from dpo_fast.judging.samples import LENGTH, STOP, SampleRow

# What train reads of a prompt's row beside the prompt, and what tells where it came from.
KEPT = ("system", "tools", "chat_template_kwargs", "weight", "id", "source", "where", "images")
# Why a prompt gives no pair, or a pair is refused.
FEW, EMPTY, ALIKE = "fewer than two scores", "empty completions", "completions that say the same"
TIED, WITHIN = "all scores equal", "scores within pairs.margin"
CUT = "the better one unfinished"
RATIO, ONLY_LENGTH = "lengths beyond pairs.max_length_ratio", "differ in length alone"


@dataclass(frozen=True)
class Candidate:
    """A completion that may be of a pair.

    cut: it did not end by itself. finished: it may be chosen.
    """

    text: str
    score: float
    finished: bool
    cut: bool = False


@dataclass(frozen=True)
class Pair:
    chosen: Candidate
    rejected: Candidate

    @property
    def difference(self) -> float:
        return self.chosen.score - self.rejected.score

    def row(self, row: SampleRow, section: PairsSection) -> dict[str, Any]:
        """As `train` reads it."""
        columns = {"soft_label": _sigmoid((section.soft_label or 0.0) * self.difference)}
        columns["margin"] = self.difference
        wanted = {"soft_label": section.soft_label is not None, "margin": section.margin_column}
        chosen, rejected = as_read(row.prompt, [self.chosen.text, self.rejected.text])
        return {
            "prompt": row.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": self.chosen.score,
            "rejected_score": self.rejected.score,
            **{name: value for name, value in columns.items() if wanted[name]},
            **({"chosen_finish_reason": LENGTH} if self.chosen.cut else {}),
            **({"rejected_finish_reason": LENGTH} if self.rejected.cut else {}),
            **{name: row.content[name] for name in KEPT if name in row.content},
        }


def pairs_of(
    row: SampleRow, scores: list[float | None], section: PairsSection, refused: Counter
) -> list[Pair]:
    """The pairs of a prompt. refused: counts why there are none, or fewer."""
    candidates = candidates_of(row, scores, section, refused)
    if len(candidates) < 2:
        refused[FEW] += 1
        return []
    if len({each.score for each in candidates}) == 1:
        refused[TIED] += 1
        return []
    return list(_allowed(row, candidates, section, refused))


def group_of(
    row: SampleRow, scores: list[float | None], section: PairsSection, refused: Counter
) -> dict[str, Any] | None:
    """The scored completions of a prompt, as `train` reads a group; None if there is nothing to learn."""
    candidates = candidates_of(row, scores, section, refused)
    if section.unfinished == "reject":
        most = max((each.score for each in candidates if each.finished), default=-math.inf)
        refused[CUT] += sum(each.score > most for each in candidates)
        candidates = [each for each in candidates if each.score <= most]
    if len(candidates) < 2 or len({each.score for each in candidates}) == 1:
        refused[FEW if len(candidates) < 2 else TIED] += 1
        return None
    reasons = [LENGTH if each.cut else STOP for each in candidates]
    return {
        "prompt": row.prompt,
        "completions": as_read(row.prompt, [each.text for each in candidates]),
        "scores": [each.score for each in candidates],
        **({"finish_reasons": reasons} if LENGTH in reasons else {}),
        **{name: row.content[name] for name in KEPT if name in row.content},
    }


def candidates_of(
    row: SampleRow, scores: list[float | None], section: PairsSection, refused: Counter
) -> list[Candidate]:
    """Completions with a score, each text once, with the mean of its scores."""
    found: dict[str, list[float]] = defaultdict(list)
    finished: dict[str, bool] = defaultdict(bool)
    for index, (text, score) in enumerate(zip(row.completions, scores, strict=True)):
        cut = row.unfinished(index)
        if score is None or (cut and section.unfinished == "drop"):
            continue
        if not text.strip():
            refused[EMPTY] += 1
            continue
        refused[ALIKE] += text in found
        found[text].append(score)
        finished[text] |= not cut
    return [
        Candidate(
            text,
            math.fsum(each) / len(each),
            finished[text] or section.unfinished == "keep",
            not finished[text],
        )
        for text, each in found.items()
    ]


def _allowed(
    row: SampleRow, candidates: list[Candidate], section: PairsSection, refused: Counter
) -> Iterator[Pair]:
    count = 0
    for pair in _wanted(row, candidates, section, refused):
        reason = _against(pair, section)
        if reason is not None:
            refused[reason] += 1
            continue
        yield pair
        count += 1
        if count == section.max_per_prompt:
            return


def _wanted(
    row: SampleRow, candidates: list[Candidate], section: PairsSection, refused: Counter
) -> list[Pair]:
    """The pairs that the strategy asks for, those of the largest differences first."""
    ordered = sorted(candidates, key=lambda each: -each.score)  # equal ones stay in their order
    if section.strategy == "all":
        every = itertools.combinations(ordered, 2)
        pairs = [Pair(*each) for each in every if each[0].score > each[1].score]
        return sorted(pairs, key=lambda pair: -pair.difference)
    best = next((each for each in ordered if each.finished), None)
    worse = [each for each in ordered if best is not None and each.score < best.score]
    if not worse:
        refused[CUT] += 1
        return []
    if section.strategy == "best_worst":
        return [Pair(best, worse[-1])]
    draw = random.Random(f"{section.seed}/{row.place}")
    return [Pair(best, draw.choice(worse))]


def _against(pair: Pair, section: PairsSection) -> str | None:
    """Why a pair is refused; None if it is not."""
    if pair.difference <= section.margin:
        return WITHIN
    if not pair.chosen.finished:
        return CUT
    if section.only_length == "drop" and same_but_for_length(pair.chosen.text, pair.rejected.text):
        return ONLY_LENGTH
    short, long = sorted((len(pair.chosen.text), len(pair.rejected.text)))
    if section.max_length_ratio is not None and long > section.max_length_ratio * short:
        return RATIO
    return None


def same_but_for_length(one: str, other: str) -> bool:
    """Whether the words of one text are the first words of the other, in any case and punctuation."""
    short, long = sorted((_words(one), _words(other)), key=len)
    return long[: len(short)] == short


def _words(text: str) -> list[str]:
    """Words; of a text that has none, as one of signs or of a formula, all that is no space."""
    return re.findall(r"\w+", text.lower()) or text.split()


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value)) if value > -700 else 0.0


def as_read(prompt: str | Messages, texts: list[str]) -> list[str] | list[Messages]:
    """Answers of a row, written so that `train` takes these texts for what follows the prompt."""
    if isinstance(prompt, str):
        # Texts that all begin with the prompt are taken for whole ones: make them so.
        repeats = without_prompt(prompt, texts) != texts
        return [prompt + text for text in texts] if repeats else texts
    if any(
        text.lstrip()[:1] in ("[", "{") for text in texts
    ):  # else JSON of messages would be messages
        return [[say("assistant", text)] for text in texts]
    return texts
