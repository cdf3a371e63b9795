"""Peak memory of a training step against what `dpo-fast doctor` says of it, and its growth with the tokens.

    python -m benchmarks.memory --tokens 8192 16384 32768 --out benchmarks/results/memory_cpu.csv

Each row is a process of its own: a pair of so many tokens, and the second of two steps. Measured is the
most that the process held, without what it held after a run of few tokens. Freed memory goes back to the
system at once (MALLOC_MMAP_THRESHOLD_): the plan counts tensors, and not what an allocator keeps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import MIB, ROOT, environment, memory_used, peak_memory, reset_peak_memory

MODEL = {
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 20,
    "vocab_size": 4096,
}
OPTIONS = {
    "kept": {"gradient_checkpointing": False},
    "recomputed": {"gradient_checkpointing": True},
    "recomputed, tiles": {"gradient_checkpointing": True, "tiled_mlp": 512},
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WORKSPACE = 16 * MIB


def write_run(folder: Path, tokens: int, model: dict) -> dict:
    """A model with random weights, one pair of so many tokens, and a run over it, as a tree."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {name: number for number, name in enumerate(("<pad>", "</s>", "p", "a", "b"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    folder.mkdir()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder / "model")
    length = tokens // 2 + 1  # the last token does not reach the model
    row = {"prompt": "p"} | {
        name: " " + " ".join([word] * (length - 2))
        for name, word in (("chosen", "a"), ("rejected", "b"))
    }
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"} | model,
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "max_length": length,
            "max_row_bytes": 1 << 24,
            "cache_dir": str(folder / "cache"),
        },
        "loss": {"type": "simpo"},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "layout": "packed",
            "workspace_bytes": WORKSPACE,
        },
    }


def measure(folder: Path, tokens: int, model: dict) -> dict[str, float]:
    """MiB that two steps take at most in this process, and those of the plan.

    A run of few tokens comes before, so that what any run loads is there.
    """
    from dpo_fast.training import distributed
    from dpo_fast.training.config import build_config
    from dpo_fast.training.console import quiet
    from dpo_fast.training.engine import release

    quiet()
    distributed.init_distributed()
    release(two_steps(build_config(write_run(folder / "few", 64, model), "few")).engine)
    tree = write_run(folder / "many", tokens, model)
    planned, before = plan(tree), memory_used("cpu")
    run = two_steps(build_config(tree, "many"))
    (length,) = {len(batch.input_ids[0]) for batch in run.train.batches(0)}
    return {"tokens": length, "measured": (peak_memory("cpu") - before) / MIB, **planned}


def two_steps(config):
    """The run after two steps. That of the second is measured: the optimiser has its states by then."""
    from dpo_fast.training.loop import update
    from dpo_fast.training.metrics import MetricSums
    from dpo_fast.training.prepare import prepare

    run = prepare(config)
    sums = MetricSums(run.engine.device)
    update(run, 0, sums)
    reset_peak_memory("cpu")
    update(run, 1, sums)
    return run


def plan(tree: dict) -> dict[str, float]:
    """MiB by the plan: all of it, and the parts that grow with the tokens."""
    from dpo_fast.cli.doctor_run import look
    from dpo_fast.training.config import build_config
    from dpo_fast.training.memory_plan import Machine

    outlook = look(build_config(tree, "benchmark"))
    lines, _ = outlook.memory(Machine.here(outlook.config))
    sizes = {line.what: (line.device + line.host) / MIB for line in lines}
    grows = ("activations kept", "activations of a layer", "head")
    return {"planned": sum(sizes.values()), **{name: sizes[name] for name in grows}}


def measured(tokens: int, name: str, threads: int) -> dict:
    """A row, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", folder, name]
        known = dict(os.environ, OMP_NUM_THREADS=str(threads), **ALLOCATOR)
        result = subprocess.run(
            [*command, "--tokens", str(tokens)], env=known, cwd=ROOT, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{name}, {tokens} tokens: {result.stderr[-1500:]}")
        return json.loads(result.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        folder, name = given.one
        print(json.dumps(measure(Path(folder), given.tokens[0], OPTIONS[name])))
        return
    rows: list[dict] = []
    for tokens in given.tokens:
        for name in given.only:
            row = {"options": name} | measured(tokens, name, given.threads)
            row["planned / measured"] = row["planned"] / row["measured"]
            rounded = {key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}
            rows.append(rounded | environment("cpu"))
            print(rounded, flush=True)
            if given.out is not None:
                write(given.out, rows)


def write(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
