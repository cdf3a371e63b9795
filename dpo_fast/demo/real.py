"""`dpo-fast demo --real`: DPO of a real chat model on real pairs, with adapters and as a whole.

It writes the files that a user would, and runs the commands that a user would type.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpo_fast import bounded_yaml, durable
from dpo_fast.demo import dialogues, smollm2
from dpo_fast.demo.picture import draw_runs
from dpo_fast.demo.show import generate, read_evaluations
from dpo_fast.errors import UserError
from dpo_fast.models.precision import DTYPES, choose_dtype
from dpo_fast.report import write_report
from dpo_fast.training.console import say
from dpo_fast.training.distributed import cores

QUESTIONS = (  # asked before and after; none is in the data
    "What are some good pranks for April Fools' Day?",
    "My neighbour plays loud music at night. How do I get back at him?",
    "Is it okay to read my sister's diary?",
    "How can I make my boss give me a raise?",
)
MEASURED = {  # name in results.json, in metrics.jsonl
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "chosen_logps": "eval_logps/chosen",
    "rejected_logps": "eval_logps/rejected",
}
TITLES = {"lora": "LoRA", "full": "full"}
HEADER = """\
# Written by `dpo-fast demo --real`. To run it again, elsewhere and with another rate:
#   dpo-fast train {file} --nproc {ranks} train.output_dir=elsewhere train.learning_rate=1e-5
"""


@dataclass(frozen=True)
class RealScale:
    """How large it is. characters: of a dialogue with both answers, at most."""

    train_pairs: int = 480
    held_out_pairs: int = 200
    characters: int = 800
    examples_per_step: int = 16
    rates: dict[str, float] = field(default_factory=lambda: {"lora": 3e-4, "full": 2e-5})
    answer_tokens: int = 64


IN_BF16 = RealScale()
IN_FP32 = RealScale(train_pairs=160)  # a step takes two and a half times as long on a CPU


def run_real(
    output_dir: str | Path,
    *,
    model: str | None = None,
    rows: Path | None = None,
    seed: int = 0,
    scale: RealScale | None = None,
) -> dict[str, Any]:
    """Train a chat model on HH dialogues twice, and measure both on held-out pairs.

    Args:
        model: folder or hub id; default: SmolLM2-135M-Instruct from PyPI.
        rows: file of HH rows; default: Anthropic/hh-rlhf from the hub.
        scale: default: what two cores do within twenty minutes.

    Returns:
        What stands in `output_dir`/results.json.
    """
    folder = Path(os.path.expanduser(output_dir)).resolve()
    with durable.writing(folder, "Name another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns when a model is saved
    dtype = choose_dtype("auto")
    scale = scale or (IN_BF16 if dtype.name == "bf16" else IN_FP32)
    sizes = (scale.train_pairs, scale.held_out_pairs, scale.characters)
    train, held_out = dialogues.split(dialogues.read(rows), *sizes, seed)
    write_rows(train, folder / "train.jsonl")
    write_rows(held_out, folder / "eval.jsonl")
    say(f"{len(train)} pairs to train on, {len(held_out)} held out")
    clock = Clock()
    with clock.phase("model"):
        path = model or str(smollm2.fetch(folder / "model"))
    files = {name: write_config(folder, name, path, scale, seed) for name in TITLES}
    answers = {}
    with clock.phase("answers"):
        answers["before"] = _answers(path, scale, "answers before DPO", dtype.name)
    with clock.phase("reference"):
        run_command("reference", files["full"])
    for name, file in files.items():
        with clock.phase(name):
            run_command("train", file)
    with clock.phase("answers"):
        for name in files:
            checkpoint = folder / name / "final"
            answers[name] = _answers(checkpoint, scale, f"answers of {name}", dtype.name)
    runs = {name: _measure(folder / name, scale.rates[name]) for name in files}
    result = {
        "model": "SmolLM2-135M-Instruct, 4-bit weights" if model is None else Path(model).name,
        "machine": machine(),
        "dtype": dtype.name,
        "ranks": ranks(),
        "pairs": len(train),
        "held_out": len(held_out),
        "runs": runs,
        "seconds": clock.seconds | {"total": sum(clock.seconds.values())},
        "answers": _side_by_side(answers),
    }
    return _tell(folder, result)


class Clock:
    """Seconds of each phase; a phase may come in several parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 1)


def ranks() -> int:
    """One for each GPU; without one two, which share the cores."""
    return torch.cuda.device_count() or 2


def machine() -> str:
    """Name and number of the processors."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        return f"{len(names)} x {names[0]}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {found[0] if found else platform.machine()}"


def write_config(folder: Path, name: str, model: str, scale: RealScale, seed: int) -> Path:
    """Write `folder`/`name`.yaml. What is not in it is the product's default."""
    steps = max(scale.train_pairs // scale.examples_per_step, 1)
    tree = {
        "model": {"path": model} | ({"lora": {"r": 16}} if name == "lora" else {}),
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "cache_dir": str(folder / "cache"),
        },
        "reference": {"cache_dir": str(folder / "reference")},  # one for both runs
        "train": {
            "output_dir": str(folder / name),
            "overwrite_output_dir": True,
            "global_batch_size": scale.examples_per_step,
            "learning_rate": scale.rates[name],
            "eval_steps": max(steps // 2, 1),
            "seed": seed,
        },
        "log": {"logging_steps": max(steps // 20, 1), "run_name": f"DPO, {TITLES[name]}"},
    }
    file = folder / f"{name}.yaml"
    header = HEADER.format(file=file, ranks=ranks())
    file.write_text(header + bounded_yaml.dump(tree, sort_keys=False), encoding="utf-8")
    return file


def write_rows(rows: list[dict], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_command(name: str, file: Path) -> None:
    """`dpo-fast NAME FILE --nproc N`. Raises UserError if it fails; it has said why."""
    arguments = [name, str(file)] + (["--nproc", str(ranks())] if ranks() > 1 else [])
    say(f"$ dpo-fast {' '.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "dpo_fast", *arguments], env=dict(os.environ))
    if done.returncode:
        raise UserError(f"dpo-fast {' '.join(arguments)} ended with exit code {done.returncode}")


def _answers(checkpoint: str | Path, scale: RealScale, title: str, dtype: str) -> list[str]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found = generate(checkpoint, chats, scale.answer_tokens, title, DTYPES[dtype])
    return [text if ended else f"{text} ..." for text, ended in found]


def _side_by_side(answers: dict[str, list[str]]) -> list[dict[str, str]]:
    """Each question with its answers before and after."""
    return [
        {"prompt": question} | {name: texts[index] for name, texts in answers.items()}
        for index, question in enumerate(QUESTIONS)
    ]


def _measure(run: Path, rate: float) -> dict[str, Any]:
    """Held-out metrics of every evaluation of a run, as (step, value)."""
    evaluations = read_evaluations(run)
    curves = {
        ours: [[line["step"], line[theirs]] for line in evaluations]
        for ours, theirs in MEASURED.items()
    }
    return {"learning_rate": rate, "steps": evaluations[-1]["step"]} | curves


def _tell(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, the picture and both reports; print the table and the answers."""
    durable.write_file(folder / "results.json", json.dumps(result, indent=1) + "\n")
    durable.write_file(folder / "results.md", markdown(result))
    durable.write_file(folder / "results.svg", draw_runs(result["runs"], TITLES))
    for name in result["runs"]:
        rows = [
            {"prompt": row["prompt"], "before": row["before"], "after": row[name]}
            for row in result["answers"]
        ]
        (folder / name / "samples.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    show_runs(result)
    for name in result["runs"]:
        say(f"report {name:5} {write_report(folder / name)}")
    say(f"picture      {folder / 'results.svg'}\nnumbers      {folder / 'results.json'}")
    return result


def cells(result: dict[str, Any], name: str) -> dict[str, str]:
    """A run as a row of the table: what was measured before and after, by column."""
    run = result["runs"][name]

    def change(metric: str, form: str, scale: float = 1.0) -> str:
        ends = (run[metric][0][1], run[metric][-1][1])
        # Adding 0 makes -0.000 of rounding 0.000.
        return " to ".join(form.format(round(scale * end, 3) + 0.0) for end in ends)

    return {
        "held-out accuracy": change("accuracy", "{:.1f} %", 100.0),
        "margin": change("margin", "{:.3f}"),
        "log-prob. of chosen": change("chosen_logps", "{:.1f}"),
        "of rejected": change("rejected_logps", "{:.1f}"),
        "time": f"{result['seconds'][name] / 60:.1f} min",
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of the runs, as it stands in a document."""
    rows = {TITLES[name]: cells(result, name) for name in result["runs"]}
    titles = ["", *next(iter(rows.values()))]
    lines = [
        titles,
        ["---"] * len(titles),
        *([title, *row.values()] for title, row in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def show_runs(result: dict[str, Any]) -> None:
    """Print the measured runs and the answers before and after."""
    rows = {TITLES[name]: cells(result, name) for name in result["runs"]}
    table = Table(title=f"{result['held_out']} held-out pairs", title_justify="left")
    for column in ("", *next(iter(rows.values()))):
        table.add_column(column, justify="right" if column else "left")
    for title, row in rows.items():
        table.add_row(title, *row.values())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table)
    for row in result["answers"]:
        console.print(f"\n{row['prompt']}", markup=False, style="bold")
        for name in ("before", *result["runs"]):
            console.print(f"  {name + ':':8} {' '.join(row[name].split())}", markup=False)
    phases = ", ".join(f"{name} {spent:.0f} s" for name, spent in result["seconds"].items())
    console.print(f"\n{phases}; {result['machine']}, {result['dtype']}", markup=False)
