"""Tokens a second, memory and bytes of a step, against the number of ranks and the length of pairs.

    python -m benchmarks.ranks --ranks 1,2,4 --answers 64,256 --csv benchmarks/results/ranks_cpu.csv

Every row is a run of `dpo-fast train --nproc N` in processes of its own, one thread to a rank: a small
Llama on pairs of one length, ZeRO-3, the same global batch for all. Several ranks are measured twice: each
with batches of its own, and all with slices of one. Bytes are those that `doctor` counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from benchmarks.results import Columns
from benchmarks.tokenizer import train_tokenizer
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import zero_config
from dpo_fast.training.exchanges import exchanges
from dpo_fast.training.traffic import traffic

COLUMNS = Columns.of(
    "ranks sequence_parallel answer tokens_of_a_pair global_batch_size zero_stage tokens_per_s "
    "x_of_one_rank peak_mib_of_a_rank sent_mib_of_a_rank steps device torch deepspeed commit date",
    "ranks sequence_parallel answer tokens_of_a_pair global_batch_size zero_stage tokens_per_s "
    "x_of_one_rank peak_mib_of_a_rank sent_mib_of_a_rank steps",
)
PROMPT, BATCH, WARM_UP = 32, 8, 3
MODEL = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
LARGE = {"stage3_param_persistence_threshold": 0}  # no matrix is too small to be sharded
WORDS = "abcdefghijklmnopqrstuvwxyz"


def write_task(folder: Path, answer: int, shared: int, steps: int, stage: int) -> Path:
    """A model, pairs of one length and a configuration; returns the configuration's file.

    shared: ranks that have slices of one row.
    """
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **MODEL)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = [
        {"prompt": text(PROMPT), "chosen": text(answer), "rejected": text(answer)}
        for _ in range(BATCH * 2)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 4096},
        "train": {
            "output_dir": str(folder / "run"),
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // 4,
            "max_steps": steps,
        },
        "parallel": {
            "zero_stage": stage,
            "sequence_parallel": shared,
            "deepspeed": {"zero_optimization": LARGE},
        },
        "log": {"logging_steps": 1},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def measure(answer: int, ranks: int, shared: int, steps: int, stage: int) -> dict:
    """The row of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_task(folder, answer, shared, steps, stage)
        command = [sys.executable, "-m", "dpo_fast", "train", str(file), "--nproc", str(ranks)]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "DPO_FAST_LAUNCHER": ""}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks, answers of {answer}: {done.stderr[-2000:]}")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        found = [each for each in map(json.loads, lines) if "perf/tokens_per_second" in each]
        sent = sent_by_a_rank(file, ranks, BATCH * (PROMPT + 2 * answer))  # a prompt comes once
    timed = found[WARM_UP:]
    return {
        "ranks": ranks,
        "sequence_parallel": shared,
        "answer": answer,
        "tokens_of_a_pair": timed[0]["num_tokens"] / BATCH,
        "global_batch_size": BATCH,
        "zero_stage": stage,
        "tokens_per_s": statistics.median(line["perf/tokens_per_second"] for line in timed),
        "peak_mib_of_a_rank": 1024 * max(line["perf/peak_memory_gib"] for line in timed),
        "sent_mib_of_a_rank": sent / 2**20,
        "steps": len(timed),
    }


def sent_by_a_rank(file: Path, ranks: int, tokens: int) -> float:
    """Bytes of a step of so many tokens, as `doctor` counts them."""
    config = build_config(yaml.safe_load(file.read_text()), str(file))
    shared = config.parallel.sequence_parallel
    batches = BATCH // (config.train.micro_batch_size * ranks // shared)
    model = scoring_skeleton(config.model)
    lines = traffic(config, zero_config(config), model, [], ranks, batches)
    lines += exchanges(config, model, [], tokens // ranks, tokens, 1 + len(METRIC_EXTRAS))
    return sum(line.sent for line in lines)


def whole_numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.ranks", description=__doc__)
    parser.add_argument("--ranks", type=whole_numbers, default=[1, 2, 4], metavar="N,N")
    parser.add_argument("--answers", type=whole_numbers, default=[64, 256], metavar="N,N")
    parser.add_argument("--steps", type=int, default=10, help="of which the first 3 are not timed")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args(arguments)
    rows, about = [], machine.environment("cpu")
    for answer in chosen.answers:
        alone = None
        for ranks, shared in [(n, size) for n in chosen.ranks for size in sorted({1, n})]:
            row = measure(answer, ranks, shared, chosen.steps, chosen.stage)
            alone = alone or row["tokens_per_s"]
            row |= {"x_of_one_rank": row["tokens_per_s"] / alone} | about
            rows.append(COLUMNS.row({k: v for k, v in row.items() if k in COLUMNS.names}))
            print(" ".join(f"{name}={rows[-1][name]}" for name in COLUMNS.names[:11]), flush=True)
            if chosen.csv:
                COLUMNS.write(chosen.csv, rows)


if __name__ == "__main__":
    main()
