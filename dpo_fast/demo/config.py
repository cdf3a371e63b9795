"""The DPO run as a configuration file, so that it can be read, changed and run again."""

from __future__ import annotations

from pathlib import Path

import yaml

from dpo_fast.demo.scale import Scale

HEADER = """\
# Written by `dpo-fast demo`. To run it again, elsewhere and with another rate:
#   dpo-fast train {file} train.output_dir=elsewhere train.learning_rate=1e-4
"""


def write_config(folder: Path, scale: Scale, seed: int) -> Path:
    """`folder`/dpo.yaml: DPO of `folder`/sft on the pairs in `folder`, into `folder`/dpo."""
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
            "num_train_epochs": scale.dpo_epochs,
            "global_batch_size": scale.examples_per_step,
            "micro_batch_size": scale.examples_per_step,
            "learning_rate": scale.dpo_learning_rate,
            "layout": "packed",
            "seed": seed,
            "eval_steps": max(steps // 3, 1),
        },
        "parallel": {"zero_stage": 3},
        "log": {"logging_steps": max(steps // 10, 1)},
    }
    file = folder / "dpo.yaml"
    text = HEADER.format(file=file) + yaml.safe_dump(tree, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file
