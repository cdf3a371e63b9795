"""Whole training steps, ours and TRL's, in one run.

    python -m benchmarks.train_run [--help]      or      dpo-fast bench train [--help]

Exit codes: 0 done; 1 something is wrong, and has no time; 2 an option that cannot be honoured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks import train_options as command
from benchmarks import train_rows, train_table
from benchmarks.train_case import WARM_UP, Task, lengths_of
from benchmarks.train_data import Pairs, draw_pairs, read_pairs
from benchmarks.train_measure import Plan, Result, measure, why_not
from benchmarks.train_model import LEARNING_RATE, MODELS, Sizes, write_model
from benchmarks.train_options import Options
from benchmarks.train_spans import Spans
from benchmarks.train_work import matmul_flops, work_of
from dpo_fast.errors import UserError


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    from dpo_fast.training import distributed
    from dpo_fast.training.quiet import quiet

    if distributed.world_size() > 1:
        raise UserError("bench train measures one process: run it without a launcher")
    quiet()  # before DeepSpeed and TRL are imported
    distributed.init_distributed()
    start, progress = time.monotonic(), _Progress()
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-fast-bench-") as folder:
            pairs = _pairs(options)
            print(f"{pairs.told}; {options.model}, {options.dtype}, {options.device}", flush=True)
            task, sizes = _task(options, pairs, Path(folder))
            plan = _plan(options, task, progress)
            matmul = matmul_flops(options.device, options.dtype)
            results = measure(task, plan)
            matmul = max(matmul, matmul_flops(options.device, options.dtype))
        rows = train_rows.table(results, task, options.model, pairs.told, sizes, matmul)
    finally:
        distributed.leave_distributed()
    _tell(rows, options, time.monotonic() - start)
    return _failures(results)


def _pairs(options: Options) -> Pairs:
    """Enough pairs for every step, or all there are, in whole global batches."""
    count = (WARM_UP + options.rounds) * options.global_pairs
    size = MODELS[options.model]["vocab_size"], options.max_length, count
    if options.data:
        pairs = read_pairs(options.data, *size)
    else:
        pairs = draw_pairs(*size, options.prompt_ratio)
    whole = len(pairs.rows) // options.global_pairs * options.global_pairs
    if not whole:
        raise UserError(
            f"--global-pairs {options.global_pairs}, but {len(pairs.rows)} pairs fit into --max-length "
            f"{options.max_length}: lower the one, raise the other or name more data"
        )
    del pairs.rows[whole:]
    return pairs


def _task(options: Options, pairs: Pairs, folder: Path) -> tuple[Task, Sizes]:
    from dpo_fast.data.sampler import Sampler

    seed = Task.seed
    sampler = Sampler(
        size=len(pairs.rows), global_pairs=options.global_pairs, micro_pairs=1, seed=seed
    )
    order = [sampler.global_batch(step) for step in range(WARM_UP + options.rounds)]
    sizes = write_model(options.model, pairs.tokenizer, folder / "model", options.device)
    works = [work_of(lengths_of([pairs.rows[row] for row in rows]), sizes) for rows in order]
    task = Task(
        model=folder / "model", data=pairs.write(folder / "pairs.jsonl"), rows=pairs.rows,
        order=order, works=works, folder=folder, spans=Spans(options.device),
        device=options.device, dtype=options.dtype, padded_pairs=options.trl_batch,
        packed_pairs=options.micro_pairs, max_length=options.max_length,
        zero_stage=options.zero_stage, learning_rate=LEARNING_RATE[options.model], seed=seed,
    )  # fmt: skip
    return task, sizes


def _plan(options: Options, task: Task, progress) -> Plan:
    """Blocks without those who cannot take part; they are named."""
    missing: dict[str, list[str]] = {}
    for contender in options.contenders:
        if reason := why_not(contender, task):
            missing.setdefault(reason, []).append(contender.name)
    for reason, names in missing.items():
        print(f"missing: {'; '.join(names)}: {reason}", flush=True)
    blocks = [[c for c in block if why_not(c, task) is None] for block in options.blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        raise UserError(f"no contender that was chosen can run here. {'; '.join(missing)}")
    return Plan(blocks, options.memory, progress)


def _tell(rows: list[dict], options: Options, seconds: float) -> None:
    print(f"\n{train_table.contenders(rows)}\n\n{train_table.checked(rows)}")
    print(train_table.shares(rows))
    print(f"\nbare product {rows[0]['matmul_tflops']:.3g} TFLOP/s; {seconds / 60:.1f} minutes")
    if options.csv:
        train_rows.write(options.csv, rows)
        print(f"rows: {options.csv}")
    if options.plots:
        from benchmarks.train_plot import draw

        for path in draw(options.csv, options.plots):
            print(f"plot: {path}")


def _failures(results: list[Result]) -> int:
    failed = [result for result in results if result.failed]
    for result in failed:
        print(f"FAILED: {result.contender.name}: {result.note}", file=sys.stderr)
    return 1 if failed else 0


class _Progress:
    """A line per contender built and per round, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        seconds = time.monotonic() - self.start
        print(f"  {seconds:4.0f} s  {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Raises UserError for what a user can mend; `python -m` tells it in one paragraph."""
    return run(command.parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"bench train: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
