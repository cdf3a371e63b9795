"""`dpo-fast demo --real --rounds`: a real chat model learns a rule from its own answers.

No pair is given. The model answers prompts of the HH dialogues, a rule of a few lines judges, and
adapters learn from the pairs of its answers, in two rounds.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_fast import bounded_yaml, durable
from dpo_fast.demo import dialogues, short, smollm2
from dpo_fast.demo.real import Clock, machine, run_command, write_rows
from dpo_fast.models.precision import choose_dtype
from dpo_fast.training.console import say

RULE = "short.py"
STAGE, LAST = "stage-1-round-{}", "generations.jsonl"
HEADER = """\
# Written by `dpo-fast demo --real --rounds`. To run it again: dpo-fast iterate {file} output_dir=elsewhere
# The rule that judges is in short.py.
"""


@dataclass(frozen=True)
class RoundsScale:
    """How large it is. characters: of a dialogue with both answers of its row, at most."""

    prompts: int = 200
    held_out: int = 64
    characters: int = 800
    completions: int = 4
    answer_tokens: int = 64
    rounds: int = 2
    examples_per_step: int = 16
    epochs: int = 2
    rate: float = 3e-4
    shown: int = 4


def run_rounds(
    output_dir: str | Path,
    *,
    model: str | None = None,
    rows: Path | None = None,
    seed: int = 0,
    scale: RoundsScale | None = None,
    rule: Path = Path(short.__file__),
) -> dict[str, Any]:
    """Train on the model's own answers, and measure how many keep the rule, before and after every round.

    Args:
        rule: a file with `at_most_two_sentences`; the others are those of `run_real`.

    Returns:
        What stands in `output_dir`/results.json.
    """
    folder = Path(os.path.expanduser(output_dir)).resolve()
    with durable.writing(folder, "Name another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
    scale = scale or RoundsScale()
    sizes = (scale.prompts, scale.held_out, scale.characters)
    prompts, held_out = dialogues.split(dialogues.read(rows), *sizes, seed)
    write_rows(prompts, folder / "prompts.jsonl")
    write_rows(held_out, folder / "held-out.jsonl")
    clock = Clock()
    with clock.phase("model"):
        path = model or str(smollm2.fetch(folder / "model"))
    file = write_rounds(folder, path, scale, seed, rule)
    with clock.phase("rounds"):
        run_command("iterate", file)
    answers = [read_answers(folder, number, scale.rounds) for number in range(scale.rounds + 1)]
    result = {
        "model": "SmolLM2-135M-Instruct, 4-bit weights" if model is None else Path(model).name,
        "machine": machine(),
        "dtype": choose_dtype("auto").name,
        "held_out": scale.held_out,
        "pairs": [pairs_of(folder, number) for number in range(1, scale.rounds + 1)],
        "rounds": [line["metrics"] for line in answers],
        "seconds": clock.seconds,
        "answers": [
            {"prompt": first["prompt"]}
            | {"answers": [line["answers"][index]["greedy"]["text"] for line in answers]}
            for index, first in enumerate(answers[0]["answers"][: scale.shown])
        ],
    }
    durable.write_file(folder / "results.json", json.dumps(result, indent=1) + "\n")
    show_rounds(result)
    say(f"report       {folder / 'rounds' / 'report.html'}")
    say(f"numbers      {folder / 'results.json'}")
    return result


def write_rounds(folder: Path, model: str, scale: RoundsScale, seed: int, judge: Path) -> Path:
    """Write the rule and `folder`/rounds.yaml. What is not in it is the product's default."""
    shutil.copyfile(judge, folder / RULE)
    rule = {"type": "rule", "function": f"{folder / RULE}:{short.at_most_two_sentences.__name__}"}
    tree = {
        "output_dir": str(folder / "rounds"),
        "model": {"path": model, "lora": {"r": 16}},
        "data": {"eval": str(folder / "held-out.jsonl")},
        # The chosen answers are short ones of the model's own; a little of sft keeps them likely.
        "loss": {"type": ["sigmoid", "sft"], "weights": [1.0, 0.2]},
        "train": {
            "learning_rate": scale.rate,
            "global_batch_size": scale.examples_per_step,
            "num_train_epochs": scale.epochs,
            "group_prompts": True,
            "seed": seed,
        },
        "sample": {"num_generations": scale.completions, "max_new_tokens": scale.answer_tokens},
        "judge": rule,
        "pairs": {"strategy": "all"},
        "generate": {
            "max_prompts": scale.held_out,
            "max_new_tokens": scale.answer_tokens,
            "judge": rule,
        },
        "stages": [{"prompts": str(folder / "prompts.jsonl"), "rounds": scale.rounds}],
    }
    file = folder / "rounds.yaml"
    text = HEADER.format(file=file) + bounded_yaml.dump(tree, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


def read_answers(folder: Path, rounds: int, of: int) -> dict[str, Any]:
    """Held-out answers after so many rounds: those with which the next run begins, or the last one ends."""
    number = min(rounds + 1, of)
    file = folder / "rounds" / STAGE.format(number) / "train" / LAST
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return lines[0] if rounds < of else lines[-1]


def pairs_of(folder: Path, number: int) -> int:
    """Pairs that a round made of its samples."""
    with open(folder / "rounds" / STAGE.format(number) / "pairs.jsonl", encoding="utf-8") as stream:
        return sum(1 for _ in stream)


def columns(result: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of the table: what was measured after so many rounds, by column."""
    return [
        {
            "rounds": str(number),
            "pairs": str(result["pairs"][number - 1]) if number else "",
            "keep the rule, greedy": f"{100 * metrics['score']:.1f} %",
            "sampled": f"{100 * metrics['sampled_score']:.1f} %",
            "tokens": f"{metrics['tokens']:.1f}",
            "distinct-2": f"{metrics['distinct_2']:.2f}",
        }
        for number, metrics in enumerate(result["rounds"])
    ]


def show_rounds(result: dict[str, Any]) -> None:
    """Print the measured rounds, and the answers before and after each."""
    rows = columns(result)
    table = Table(title=f"{result['held_out']} held-out prompts", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row.values())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table)
    for row in result["answers"]:
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        console.print(f"\n{asked}", markup=False, style="bold")
        for number, text in enumerate(row["answers"]):
            console.print(f"  {number}: {' '.join(text.split())}", markup=False)
    minutes = result["seconds"]["rounds"] / 60
    console.print(f"\n{minutes:.1f} min; {result['machine']}, {result['dtype']}", markup=False)
