"""The task: name the larger of two numbers. And its scale: the whole demo, or a quick one for tests."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.demo.student import StudentSize

WORDINGS = ("Which is larger, {} or {}?", "Which is more: {} or {}?", "Larger of {} and {}?")
ANSWER = "It is {}."


@dataclass(frozen=True)
class Question:
    """Two different numbers in the order of the text, with a right and a wrong answer."""

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
    """`train` questions and `held_out` questions.

    Training never sees the pairs of numbers that are held out, in either order or in any wording.

    Raises:
        ValueError: `numbers` has too few pairs.
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


def write_pairs(questions: Iterable[Question], file: Path) -> None:
    """One JSON line for each question."""
    rows = (json.dumps(question.pair) + "\n" for question in questions)
    file.write_text("".join(rows), encoding="utf-8")


@dataclass(frozen=True)
class Scale:
    """How large the demo is. `examples_per_step` holds for SFT and for DPO."""

    numbers: range = range(10, 60)
    train_questions: int = 4800
    held_out_questions: int = 200
    size: StudentSize = StudentSize(hidden=256, layers=3, heads=4, key_value_heads=4)
    examples_per_step: int = 32
    sft_steps: int = 140
    sft_learning_rate: float = 1e-3
    dpo_learning_rate: float = 5e-4
    dpo_epochs: float = 1.0
    beta: float = 0.3
    sft_weight: float = 1.0


WHOLE = Scale()
QUICK = Scale(
    numbers=range(10, 40),
    train_questions=640,
    held_out_questions=48,
    size=StudentSize(hidden=64, layers=2, heads=2, key_value_heads=2),
    sft_steps=60,
    sft_learning_rate=3e-3,
    dpo_learning_rate=2e-3,
)
