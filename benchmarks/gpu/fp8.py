"""A run in bf16 and the same with products in fp8: losses side by side, and the time of a step.

    python -m benchmarks.gpu.fp8 run.yaml --steps 200 --out build/fp8

Every run is a `dpo-fast train` of the configuration in a process of its own, on one GPU, compiled, from the
same weights on the same batches. It needs Hopper and torchao. On a CPU the products are emulated
(DPO_FAST_EMULATE_PRODUCTS=1): losses can be compared there, times say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import jsonl

RECIPES = ("none", "tensorwise", "rowwise", "rowwise_with_gw_hp")
BASE = RECIPES[0]
WARM_UP = 20  # steps that compile, and find their memory
HEADER = (
    "| products | mean loss, last quarter | mean difference of a step | largest | examples/s | x |"
)


def train(file: str, recipe: str, steps: int, folder: Path, more: list[str]) -> list[dict]:
    """The lines of a run's metrics, one a step. Raises SystemExit if it failed."""
    overrides = [
        f"model.fp8={'null' if recipe == BASE else recipe}",
        *(f"train.max_steps={steps}", f"train.output_dir={folder / recipe}"),
        *("log.logging_steps=1", "train.overwrite_output_dir=true"),
    ]
    command = [sys.executable, "-m", "dpo_fast", "train", file, *overrides, *more]
    if subprocess.run(command).returncode:
        raise SystemExit(f"the run with model.fp8={recipe} failed")
    lines = jsonl.read(folder / recipe / "metrics.jsonl")
    return [line for line in lines if "loss" in line]


def compare(plain: list[dict], other: list[dict]) -> dict[str, float]:
    """Losses of two runs step by step, and how fast they were without their first steps."""
    losses = [[line["loss"] for line in run] for run in (plain, other)]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    begin = min(WARM_UP, len(plain) // 2)
    rates = [
        statistics.median(line["perf/examples_per_second"] for line in run[begin:])
        for run in (plain, other)
    ]
    return {
        "last": statistics.fmean(losses[1][-max(len(losses[1]) // 4, 1) :]),
        "mean": statistics.fmean(apart),
        "largest": max(apart),
        "rate": rates[1],
        "times": rates[1] / rates[0],
    }


def table(runs: dict[str, list[dict]]) -> str:
    """The rows of all runs against the first, as Markdown."""
    rows = [HEADER, "|---|---|---|---|---|---|"]
    for name, lines in runs.items():
        found = compare(runs[BASE], lines)
        rows.append(
            f"| {'bf16' if name == BASE else name} | {found['last']:.4f} | {found['mean']:.4f} | "
            f"{found['largest']:.4f} | {found['rate']:.2f} | {found['times']:.2f} |"
        )
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration of a run that fits one GPU")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/fp8"))
    parser.add_argument("--recipes", default=",".join(RECIPES[:3]), help="none is bf16")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every run")
    options = parser.parse_args(arguments)
    recipes = dict.fromkeys((BASE, *options.recipes.split(",")))
    runs = {
        name: train(options.config, name, options.steps, options.out, options.overrides)
        for name in recipes
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(table(runs) + "\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
