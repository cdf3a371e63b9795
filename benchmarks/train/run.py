"""The run of `bench train`: pairs, model, everybody's steps, and the tables of them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.train import options as command
from benchmarks.train import plot, table
from benchmarks.train.case import WARM_UP, Task, lengths_of
from benchmarks.train.data import Pairs, draw_pairs, read_pairs
from benchmarks.train.measure import Plan, measure, why_not
from benchmarks.train.model import LEARNING_RATE, MODELS, Sizes, write_model
from benchmarks.train.options import Options
from benchmarks.train.rows import COLUMNS, rows_of
from benchmarks.train.spans import Spans
from benchmarks.train.work import matmul_flops, work_of
from dpo_fast.errors import UserError


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    from dpo_fast.training import distributed
    from dpo_fast.training.quiet import quiet

    if distributed.world_size() > 1:
        raise UserError("bench train measures one process: run it without a launcher")
    quiet()  # before DeepSpeed and TRL are imported
    distributed.init_distributed()
    start, progress = time.monotonic(), report.Progress()
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-fast-bench-") as folder:
            pairs = _pairs(options)
            print(f"{pairs.told}; {options.model}, {options.dtype}, {options.device}", flush=True)
            task, sizes = _task(options, pairs, Path(folder))
            plan = _plan(options, task, progress)
            matmul = matmul_flops(options.device, options.dtype)
            results = measure(task, plan)
            matmul = max(matmul, matmul_flops(options.device, options.dtype))
        rows = rows_of(results, task, options.model, pairs.told, sizes, matmul)
    finally:
        distributed.leave_distributed()
    _tell(rows, options, time.monotonic() - start)
    return report.tell_failures([f"{r.contender.name}: {r.note}" for r in results if r.failed])


def _pairs(options: Options) -> Pairs:
    """Enough pairs for every step, or all there are, in whole global batches."""
    count = (WARM_UP + options.rounds) * options.global_batch_size
    size = MODELS[options.model]["vocab_size"], options.max_length, count
    if options.data:
        pairs = read_pairs(options.data, *size)
    else:
        pairs = draw_pairs(*size, options.prompt_ratio)
    whole = len(pairs.rows) // options.global_batch_size * options.global_batch_size
    if not whole:
        raise UserError(
            f"--global-pairs {options.global_batch_size}, but {len(pairs.rows)} pairs fit into --max-length "
            f"{options.max_length}: lower the one, raise the other or name more data"
        )
    del pairs.rows[whole:]
    return pairs


def _task(options: Options, pairs: Pairs, folder: Path) -> tuple[Task, Sizes]:
    from dpo_fast.data.sampler import Sampler

    seed = Task.seed
    sampler = Sampler(
        size=len(pairs.rows),
        global_batch_size=options.global_batch_size,
        micro_batch_size=1,
        seed=seed,
    )
    order = [sampler.global_batch(step) for step in range(WARM_UP + options.rounds)]
    sizes = write_model(options.model, pairs.tokenizer, folder / "model", options.device)
    works = [work_of(lengths_of([pairs.rows[row] for row in rows]), sizes) for rows in order]
    task = Task(
        model=folder / "model",
        data=pairs.write(folder / "pairs.jsonl"),
        rows=pairs.rows,
        order=order,
        works=works,
        folder=folder,
        spans=Spans(options.device),
        device=options.device,
        dtype=options.dtype,
        padded_pairs=options.trl_batch,
        packed_pairs=options.micro_batch_size,
        max_length=options.max_length,
        zero_stage=options.zero_stage,
        learning_rate=LEARNING_RATE[options.model],
        seed=seed,
    )
    return task, sizes


def _plan(options: Options, task: Task, progress) -> Plan:
    """Blocks without those who cannot take part; they are named."""
    reasons = {contender.name: why_not(contender, task) for contender in options.contenders}
    missing = {name: reason for name, reason in reasons.items() if reason}
    report.tell_missing(missing.items())
    blocks = [[c for c in block if c.name not in missing] for block in options.blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        told = "; ".join(dict.fromkeys(missing.values()))
        raise UserError(f"no contender that was chosen can run here. {told}")
    return Plan(blocks, options.memory, progress)


def _tell(rows: list[dict], options: Options, seconds: float) -> None:
    print(f"\n{table.contenders(rows)}\n\n{table.checked(rows)}")
    print(table.shares(rows))
    print(f"\nbare product {rows[0]['matmul_tflops']:.3g} TFLOP/s; {seconds / 60:.1f} minutes")
    if options.output.csv:
        COLUMNS.write(options.output.csv, rows)
    options.output.tell(plot.draw)


def main(arguments: list[str]) -> int:
    return run(command.parse(arguments))
