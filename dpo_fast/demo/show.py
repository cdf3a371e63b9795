"""Greedy answers of a checkpoint, and the table of before and after on a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.demo.task import Question
from dpo_fast.training import distributed
from dpo_fast.training.console import track

BATCH = 64


@dataclass(frozen=True)
class Completions:
    """A checkpoint's answer to each question, and the share of answers that are right."""

    texts: list[str]
    right_share: float


def complete(checkpoint: Path, questions: Sequence[Question], description: str) -> Completions:
    """Answer the questions.

    An answer is right if the whole text is the right answer and ends by itself.
    """
    chats = [question.messages for question in questions]
    answers = generate(checkpoint, chats, 16, description)
    right = sum(answer == (q.right, True) for answer, q in zip(answers, questions))
    return Completions([text for text, _ in answers], right / len(questions))


@torch.no_grad()
def generate(
    checkpoint: Path | str,
    chats: Sequence[list[dict[str, str]]],
    most_tokens: int,
    description: str,
    dtype: torch.dtype | None = None,
) -> list[tuple[str, bool]]:
    """Greedy answers to chats, with transformers alone; and whether each ended by itself.

    dtype: of the weights; default: as they are stored.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    options = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    model = model.to(distributed.device()).eval()
    batches = [chats[i : i + BATCH] for i in range(0, len(chats), BATCH)]
    answers = []
    for batch in track(batches, description, len(batches)):
        prompts = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        ids = model.generate(**prompts, max_new_tokens=most_tokens, do_sample=False)
        for answer in ids[:, prompts["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in answer
            length = answer.index(tokenizer.eos_token_id) if ended else len(answer)
            answers.append((tokenizer.decode(answer[:length]), ended))
    return answers


def read_evaluations(run: Path) -> list[dict[str, float]]:
    """The evaluations in a run's metrics.jsonl, in their order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "eval_loss" in line]


def samples(
    questions: Sequence[Question], before: Completions, after: Completions, count: int
) -> list[dict[str, str]]:
    """`count` questions with both answers and the right one. Changed answers come first."""
    rows = [
        {"prompt": question.text, "before": old, "after": new, "right": question.right}
        for question, old, new in zip(questions, before.texts, after.texts)
    ]
    return sorted(rows, key=lambda row: row["before"] == row["after"])[:count]


def show_result(result: dict[str, Any], rows: Sequence[dict[str, str]]) -> None:
    """Print the table of before and after, and the sample answers."""
    table = Table(title="held-out questions", title_justify="left")
    for column in ("", "before DPO", "after DPO"):
        table.add_column(column, justify="right" if column else "left")
    for name, label, form in (
        ("reward_accuracy", "reward accuracy", "{:.1%}"),
        ("right_share", "right answers (greedy)", "{:.1%}"),
        ("chosen_logps", "log-prob. of right answers", "{:.2f}"),
        ("rejected_logps", "log-prob. of wrong answers", "{:.2f}"),
    ):
        table.add_row(label, *(form.format(result[name][when]) for when in ("before", "after")))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table)
    console.print("examples, changed answers first")
    for row in rows:
        console.print(
            f"{row['prompt']}\n  before: {row['before']}\n  after:  {row['after']}", markup=False
        )
