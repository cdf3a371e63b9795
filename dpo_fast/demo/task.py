"""The task: of two numbers, name the larger one. A right and a wrong answer for every question."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WORDINGS = ("Which is larger, {} or {}?", "Which is more: {} or {}?", "Larger of {} and {}?")
ANSWER = "It is {}."


@dataclass(frozen=True)
class Question:
    """Two different numbers, in the order in which the text names them."""

    first: int
    second: int
    wording: str

    @property
    def text(self) -> str:
        return self.wording.format(self.first, self.second)

    @property
    def right(self) -> str:
        return ANSWER.format(max(self.first, self.second))

    @property
    def wrong(self) -> str:
        return ANSWER.format(min(self.first, self.second))

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    @property
    def pair(self) -> dict[str, list[dict[str, str]]]:
        """A row of preference data: message lists, as in the data sets people use."""
        return {
            "prompt": self.messages,
            "chosen": [{"role": "assistant", "content": self.right}],
            "rejected": [{"role": "assistant", "content": self.wrong}],
        }


def make_questions(
    train: int, held_out: int, numbers: range, seed: int
) -> tuple[list[Question], list[Question]]:
    """`train` questions, and `held_out` ones about pairs of numbers that training never sees,
    in no order and no wording.

    Raises:
        ValueError: `numbers` has too few pairs for it.
    """
    chance = random.Random(seed)
    pairs = list(itertools.combinations(numbers, 2))
    chance.shuffle(pairs)
    asked = [
        (*order, w) for a, b in pairs[held_out:] for order in ((a, b), (b, a)) for w in WORDINGS
    ]
    if len(pairs) <= held_out or len(asked) < train:
        raise ValueError(f"{numbers} gives {len(pairs)} pairs: too few for {train} + {held_out}")
    unseen = [
        Question(*chance.sample(pair, 2), chance.choice(WORDINGS)) for pair in pairs[:held_out]
    ]
    return [Question(*question) for question in chance.sample(asked, train)], unseen


def write_pairs(questions: Iterable[Question], file: Path) -> Path:
    """One JSON row for each question."""
    rows = (json.dumps(question.pair) + "\n" for question in questions)
    file.write_text("".join(rows), encoding="utf-8")
    return file
