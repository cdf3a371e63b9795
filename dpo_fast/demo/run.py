"""The demo from its first line to its last: questions, tokenizer, model, SFT, DPO, before and after."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_fast import bounded_yaml, durable
from dpo_fast.data.config import DataConfig
from dpo_fast.demo.show import Completions, complete, read_evaluations, samples, show_result
from dpo_fast.demo.student import LAYOUT, build_model, build_tokenizer, fine_tune, save_model
from dpo_fast.demo.task import QUICK, WHOLE, Question, Scale, make_questions, write_pairs
from dpo_fast.report import write_report
from dpo_fast.training import distributed
from dpo_fast.training.config import load_config
from dpo_fast.training.console import say
from dpo_fast.training.loop import train

SHOWN, REPORTED = 3, 12  # sample answers on the terminal, in the report
HEADER = """\
# Written by `dpo-fast demo`. To run it again, elsewhere and with another rate:
#   dpo-fast train {file} train.output_dir=elsewhere train.learning_rate=1e-4
"""


def run_demo(output_dir: str | Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Teach a tiny model to answer, then by DPO to answer right. All files go to `output_dir`.

    Args:
        seed: of the questions, the weights and the order of the data.
        quick: a much smaller model and task, for tests.

    Returns:
        `reward_accuracy`, `right_share`, `chosen_logps`, `rejected_logps`: of held-out questions,
            {"before": float, "after": float} each.
        `parameters`: of the model. `seconds`: {"sft": float, "dpo": float}.
        `config`, `sft`, `checkpoint`, `report`: paths.
    """
    folder = Path(os.path.expanduser(output_dir)).resolve()
    with durable.writing(folder, "Name another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
    scale = QUICK if quick else WHOLE
    say("loading DeepSpeed")
    distributed.init_distributed()
    sizes = (scale.train_questions, scale.held_out_questions)
    questions, held_out = make_questions(*sizes, scale.numbers, seed)
    write_pairs(questions, folder / "train.jsonl")
    write_pairs(held_out, folder / "eval.jsonl")
    parameters, sft_seconds = _teach_format(folder, questions, scale, seed)
    before = complete(folder / "sft", held_out, "answers before DPO")
    say(f"SFT took {sft_seconds:.0f} s; {before.right_share:.0%} of its held-out answers are right")
    config = write_config(folder, scale, seed)
    checkpoint, dpo_seconds = _prefer_right(config)
    after = complete(checkpoint, held_out, "answers after DPO")
    result = _measure(folder / "dpo", before, after) | {
        "parameters": parameters,
        "seconds": {"sft": sft_seconds, "dpo": dpo_seconds},
        "config": config,
        "sft": folder / "sft",
        "checkpoint": checkpoint,
    }
    return _tell(folder / "dpo", result, samples(held_out, before, after, REPORTED))


def _teach_format(
    folder: Path, questions: Sequence[Question], scale: Scale, seed: int
) -> tuple[int, float]:
    """SFT of a new model into `folder`/sft; returns its number of parameters, and seconds."""
    began = time.monotonic()
    tokenizer = build_tokenizer(text for q in questions for text in (q.text, q.right, q.wrong))
    model = build_model(tokenizer, scale.size, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"a new Llama of {parameters / 1e6:.1f} million parameters and {len(tokenizer)} tokens; "
        f"{len(questions)} questions like: {questions[0].text}\n"
        "SFT on right and wrong answers alike: it learns to answer, not which answer is right"
    )
    data = DataConfig(
        train=str(folder / "train.jsonl"), max_length=64, cache_dir=str(folder / "cache")
    )
    fine_tune(
        model,
        tokenizer,
        data,
        steps=scale.sft_steps,
        examples_per_step=scale.examples_per_step,
        learning_rate=scale.sft_learning_rate,
        seed=seed,
    )
    save_model(model, tokenizer, folder / "sft")
    return parameters, time.monotonic() - began


def write_config(folder: Path, scale: Scale, seed: int) -> Path:
    """Write `folder`/dpo.yaml: DPO of `folder`/sft on the pairs in `folder`, into `folder`/dpo.

    A file, so that people can read the run, change it and run it again.
    """
    steps = max(scale.train_questions // scale.examples_per_step, 1)
    tree = {
        "model": {"path": str(folder / "sft"), "dtype": "fp32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "loss": {
            "type": ["sigmoid", "sft"],  # the second term keeps the right answers likely
            "weights": [1.0, scale.sft_weight],
            "beta": scale.beta,
        },
        "reference": {"provider": "cached"},
        "train": {
            "output_dir": str(folder / "dpo"),
            "overwrite_output_dir": True,
            "num_train_epochs": scale.dpo_epochs,
            "global_batch_size": scale.examples_per_step,
            "micro_batch_size": scale.examples_per_step,
            "learning_rate": scale.dpo_learning_rate,
            "layout": LAYOUT,
            "seed": seed,
            "eval_steps": max(steps // 3, 1),
        },
        "parallel": {"zero_stage": 3},
        "log": {"logging_steps": max(steps // 10, 1)},
    }
    file = folder / "dpo.yaml"
    text = HEADER.format(file=file) + bounded_yaml.dump(tree, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


def _prefer_right(file: Path) -> tuple[Path, float]:
    """DPO as the configuration file says; returns the checkpoint, and seconds."""
    say(f"DPO under DeepSpeed ZeRO-3, as in {file}: of each pair the right answer is preferred")
    began = time.monotonic()
    return train(load_config(str(file))), time.monotonic() - began


def _measure(run: Path, before: Completions, after: Completions) -> dict[str, Any]:
    """What changed on held-out questions between the start and the end of the run."""
    evaluations = read_evaluations(run)
    ends = {"before": evaluations[0], "after": evaluations[-1]}
    names = {
        "reward_accuracy": "eval_rewards/accuracies",
        "chosen_logps": "eval_logps/chosen",
        "rejected_logps": "eval_logps/rejected",
    }
    measured = {
        ours: {when: line[theirs] for when, line in ends.items()} for ours, theirs in names.items()
    }
    return measured | {"right_share": {"before": before.right_share, "after": after.right_share}}


def _tell(run: Path, result: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """Write the report and print the result; returns the result with the report's path."""
    (run / "samples.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    result = result | {"report": write_report(run)}
    show_result(result, rows[:SHOWN])
    for name in ("report", "checkpoint", "config"):
        say(f"{name:11} {result[name]}")
    return result
