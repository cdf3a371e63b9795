"""How large the demo is: the whole one, and a quick one for tests."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_fast.demo.student import StudentSize


@dataclass(frozen=True)
class Scale:
    """Numbers in the questions, questions, steps and rates; `examples_per_step` is that of SFT and DPO."""

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
