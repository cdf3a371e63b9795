"""`bench train`: the run: pairs, model, everybody's steps, tables."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.machine import Stopwatch
from benchmarks.results import Progress, print_failures, print_missing
from benchmarks.train.case import (
    LEARNING_RATE,
    MODELS,
    WARM_UP,
    ModelSizes,
    Task,
    lengths_of,
    matmul_flops,
    step_work,
    write_model,
)
from benchmarks.train.lines import Lines
from benchmarks.train.measure import Lineup, measure, why_not
from benchmarks.train.options import Options, parse
from benchmarks.train.pairs import Pairs, draw_pairs, read_pairs
from benchmarks.train.results import COLUMNS, agreement, draw, factors, rows_of, table
from dpo_fast.errors import UserError


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    from dpo_fast.training import distributed
    from dpo_fast.training.console import quiet

    if distributed.world_size() > 1:
        raise UserError("bench train measures one process: run it without a launcher")
    quiet()  # before DeepSpeed and TRL are imported
    distributed.init_distributed()
    start, progress = time.monotonic(), Progress()
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-fast-bench-") as folder:
            pairs = _pairs(options)
            print(f"{pairs.origin}; {options.model}, {options.dtype}, {options.device}", flush=True)
            task, sizes = _task(options, pairs, Path(folder))
            matmul = matmul_flops(options.device, options.dtype)
            told = task, options.model, pairs.origin, sizes
            lines = Lines(options.lines, lambda results: rows_of(results, *told, matmul))
            results = measure(task, _lineup(options, task, progress, lines))
            matmul = max(matmul, matmul_flops(options.device, options.dtype))
        rows = rows_of(results, *told, matmul)
    finally:
        distributed.leave_distributed()
    _finish(rows, options, time.monotonic() - start)
    return print_failures([f"{r.contender.name}: {r.note}" for r in results if r.failed])


def _pairs(options: Options) -> Pairs:
    """Pairs for every step, or all there are, in whole global batches."""
    count = (WARM_UP + options.rounds) * options.global_batch_size
    size = MODELS[options.model]["vocab_size"], options.max_length, count
    if options.data:
        pairs = read_pairs(options.data, *size)
    else:
        pairs = draw_pairs(*size, options.prompt_ratio)
    whole = len(pairs.rows) // options.global_batch_size * options.global_batch_size
    if not whole:
        raise UserError(
            f"--global-batch-size {options.global_batch_size}, but {len(pairs.rows)} pairs fit into "
            f"--max-length {options.max_length}: lower the one, raise the other or name more data"
        )
    del pairs.rows[whole:]
    return pairs


def _task(options: Options, pairs: Pairs, folder: Path) -> tuple[Task, ModelSizes]:
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
    pairs.tokenizer.save_pretrained(folder / "tokenizer")
    works = [step_work(lengths_of([pairs.rows[row] for row in rows]), sizes) for rows in order]
    task = Task(
        model=folder / "model",
        tokenizer=folder / "tokenizer",
        data=pairs.write(folder / "pairs.jsonl"),
        rows=pairs.rows,
        order=order,
        works=works,
        folder=folder,
        stopwatch=Stopwatch(options.device),
        device=options.device,
        dtype=options.dtype,
        padded_pairs=options.trl_batch,
        packed_pairs=options.micro_batch_size,
        max_length=options.max_length,
        zero_stage=options.zero_stage,
        learning_rate=LEARNING_RATE[options.model],
        attention=options.attention,
        liger=options.liger,
        seed=seed,
    )
    return task, sizes


def _lineup(options: Options, task: Task, progress, done) -> Lineup:
    """Blocks of the contenders that can take part. The others are named."""
    missing = {c.name: why for c in options.contenders if (why := why_not(c, task))}
    print_missing(missing.items())
    blocks = [[c for c in block if c.name not in missing] for block in options.blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        reasons = "; ".join(dict.fromkeys(missing.values()))
        raise UserError(f"no contender that was chosen can run here. {reasons}")
    return Lineup(blocks, options.memory, progress, done)


def _finish(rows: list[dict], options: Options, seconds: float) -> None:
    print(f"\n{table(rows)}\n\n{agreement(rows)}\n{factors(rows)}")
    print(f"\nbare product {rows[0]['matmul_tflops']:.3g} TFLOP/s; {seconds / 60:.1f} minutes")
    if options.output.csv:
        COLUMNS.write(options.output.csv, rows)
    options.output.finish(draw)


def main(arguments: list[str]) -> int:
    return run(parse(arguments))
