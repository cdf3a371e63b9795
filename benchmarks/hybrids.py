"""A hybrid and a mixture of experts in every layout, ours and TRL's: positions computed and pairs a second.

    python -m benchmarks.hybrids --csv benchmarks/results/hybrids_cpu.csv
    python -m benchmarks.hybrids --quick                     # tiny models, two rounds: does everything run?

Each model is a run of `bench train` in a process of its own: the same pairs, model and optimiser for all,
one step of each contender in turn, medians over the rounds, losses held against TRL's. The hybrid is
Qwen3-Next without experts (three layers of gated delta rule to one of attention), the mixture Qwen3-MoE.
The reference is a frozen model beside the policy, for everybody.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import Columns
from dpo_fast.errors import UserError

MODELS = {"hybrid": "Qwen3-Next", "mixture": "Qwen3-MoE"}
CONTENDERS = ("trl", "trl, no checkpointing", "trl, padding_free", "dpo_fast *, frozen")
NUMBERS = (
    "parameters global_batch_size micro_batch_size rounds s_p20 s_p50 s_p80 pairs_per_s x_of_trl "
    "computed_tokens data_tokens once_tokens peak_mib first_loss last_loss loss_err threads"
)
NAMES = (
    f"impl model kind layout reference checkpointing attention dtype data {NUMBERS} max_length device "
    "torch transformers deepspeed trl commit date note"
)
COLUMNS = Columns.of(NAMES, NUMBERS)


def measure(kind: str, quick: bool, options: list[str]) -> list[dict]:
    """The rows of one model. options: further ones of `bench train`. Raises UserError if it fails."""
    model = f"{'quick' if quick else 'tiny'}-{kind}"
    with tempfile.TemporaryDirectory(prefix="dpo-fast-hybrids-") as folder:
        file = Path(folder, "rows.csv")
        chosen = [word for name in CONTENDERS for word in ("--only", name)]
        command = [sys.executable, "-m", "benchmarks.run", "train", "--model", model, *chosen]
        done = subprocess.run([*command, "--csv", str(file), *options], check=False)
        if done.returncode or not file.exists():
            raise UserError(
                f"{model}: bench train ended with {done.returncode}; see what it printed"
            )
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    return [{name: row.get(name, "") for name in NAMES.split()} | {"kind": kind} for row in rows]


def table(rows: list[dict]) -> str:
    """The rows as a page shows them."""
    lines = ["| | pairs/s | x TRL | positions computed | memory |", "|---|---|---|---|---|"]
    for kind, name in MODELS.items():
        lines.append(f"| *{name}* | | | | |")
        for row in (row for row in rows if row["kind"] == kind):
            if not row["pairs_per_s"]:
                lines.append(f"| {row['impl']} | {row['note']} | | | |")
                continue
            speed, times = float(row["pairs_per_s"]), row["x_of_trl"]
            factor = f"{float(times):.2f}" if times else ""
            memory = f"{float(row['peak_mib']):,.0f} MiB" if row["peak_mib"] else ""
            computed = f"{float(row['computed_tokens']):,.0f}"
            lines.append(f"| {row['impl']} | {speed:.2f} | {factor} | {computed} | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.hybrids", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds")
    parser.add_argument("--rounds", help="timed steps of each contender")
    parser.add_argument("--data", help="pairs, as data.train takes them (default: drawn at random)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    given = parser.parse_args(arguments)
    options = [*("--rounds", given.rounds)] if given.rounds else ["--rounds", "2"] * given.quick
    options += ["--data", given.data] if given.data else []
    if given.quick:
        options += ["--global-batch-size", "8", "--trl-batch", "4", "--max-length", "256"]
    rows = [row for kind in MODELS for row in measure(kind, given.quick, options)]
    if given.csv:
        COLUMNS.write(given.csv, rows)
    print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmarks.hybrids: {error}", file=sys.stderr)
        sys.exit(2)
