"""`bench train`: the options, and the run: pairs, model, everybody's steps, tables."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cli import LIGER, Parser, Selection, choose_device, positive, whole
from benchmarks.machine import Stopwatch
from benchmarks.results import Output, Progress, print_failures, print_missing
from benchmarks.train.case import (
    CONTENDERS,
    LEARNING_RATE,
    MODELS,
    WARM_UP,
    Contender,
    ModelSizes,
    Task,
    lengths_of,
    matmul_flops,
    step_work,
    write_model,
)
from benchmarks.train.lines import Lines
from benchmarks.train.measure import Lineup, measure, why_not
from benchmarks.train.pairs import Pairs, draw_pairs, read_pairs
from benchmarks.train.results import COLUMNS, agreement, draw, factors, rows_of, table
from dpo_fast.errors import UserError
from dpo_fast.ops.dispatch import interpreting

USAGE = """whole training steps, ours and TRL's, of one model on the same pairs in one run

By default: on a CPU an 8.9-million-parameter Llama in fp32, on a GPU qwen2.5-0.5b in bf16; random
weights, a tokenizer trained on the data, pairs drawn with the lengths of HH harmless."""
USUAL = {"global_batch_size": "32", "trl_batch": "8", "rounds": "5", "max_length": "1024"}
QUICK = {"global_batch_size": "8", "trl_batch": "4", "rounds": "2", "max_length": "256"}
QUICK_MODEL = "quick"
SIZES = {
    "--global-batch-size": "pairs of a step",
    "--trl-batch": "pairs of a forward of TRL's and of our padded layout",
    "--micro-batch-size": "pairs of a forward of our other layouts",
    "--rounds": "timed steps of each contender",
    "--max-length": "tokens of a sequence; longer pairs are left out for everybody",
}
ORDERS = ("side-by-side", "one-by-one")


@dataclass(frozen=True)
class Options:
    """What to measure, and where the rows go."""

    contenders: tuple[Contender, ...]
    data: str | None
    model: str
    device: str
    dtype: str
    global_batch_size: int
    trl_batch: int
    micro_batch_size: int
    rounds: int
    max_length: int
    zero_stage: int
    prompt_ratio: float | None
    side_by_side: bool
    attention: str
    liger: bool
    memory: bool
    output: Output
    lines: Path | None

    @property
    def blocks(self) -> list[list[Contender]]:
        """Who is measured together."""
        if self.side_by_side:
            return [list(self.contenders)]
        return [[contender] for contender in self.contenders]


def parser() -> argparse.ArgumentParser:
    made = Parser("bench train", USAGE)
    add = made.add_argument
    add("--data", metavar="NAME", help="pairs, as data.train takes them (default: drawn at random)")
    add("--prompt-ratio", metavar="R", help="drawn pairs: prompts R times as long as the answers")
    add("--model", metavar="NAME", help=f"configuration: {', '.join(MODELS)}")
    for option, what in SIZES.items():
        name = option.lstrip("-").replace("-", "_")
        add(option, metavar="N", help=f"{what} (default {USUAL.get(name, '--trl-batch')})")
    made.add_common("--only", "--skip")
    add(
        "--order",
        metavar="ORDER",
        help="side-by-side: step by step in turn (default on a CPU); "
        "one-by-one: for models that do not fit beside each other (default on a GPU)",
    )
    made.add_common("--device")
    add("--attention", metavar="NAME", help="model.attention of our layouts without padding")
    add(
        "--liger",
        action="store_true",
        help="norms, MLPs and RoPE of all contenders: liger-kernel's",
    )
    add("--dtype", metavar="NAME", help="fp32 or bf16 (default: fp32 on a CPU, bf16 on a GPU)")
    add("--zero-stage", metavar="N", help="of our engine, 0 to 3 (default: 0 in fp32, 1 in bf16)")
    add("--quick", action="store_true", help="a tiny model and two rounds: does everything run?")
    add("--csv", metavar="FILE", help="write the rows here")
    add(
        "--jsonl", metavar="FILE", help="add each row here as a line of JSON as soon as it is known"
    )
    made.add_common("--plots", "--no-memory")
    return made


def parse(arguments: list[str]) -> Options:
    """Options of the command line, checked."""
    given = parser().parse_args(arguments)
    device = choose_device(None if given.device == "auto" else given.device)
    if device == "cpu" and torch.cuda.is_available():
        raise UserError(
            "--device cpu: the trainer takes a GPU that it sees; hide it with "
            "CUDA_VISIBLE_DEVICES= in the environment"
        )
    dtype = _choice("--dtype", given.dtype, ("fp32", "bf16"), "fp32" if device == "cpu" else "bf16")
    sizes = {name: whole(f"--{name.replace('_', '-')}", text) for name, text in _sizes(given)}
    usual_order = ORDERS[0] if device == "cpu" else ORDERS[1]
    output = Output.of(given, "train")
    options = Options(
        contenders=_contenders(given),
        data=given.data,
        model=_model(given, device),
        device=device,
        dtype=dtype,
        micro_batch_size=_micro_batch_size(given, sizes),
        zero_stage=_zero_stage(given.zero_stage, dtype),
        prompt_ratio=_ratio(given),
        side_by_side=_choice("--order", given.order, ORDERS, usual_order) == ORDERS[0],
        attention=given.attention or "auto",
        liger=_liger(given, device),
        memory=not given.no_memory,
        output=output,
        lines=Path(given.jsonl) if given.jsonl else None,
        **sizes,
    )
    for name in ("trl_batch", "micro_batch_size"):
        _divides(f"--{name.replace('_', '-')}", getattr(options, name), options.global_batch_size)
    return options


def _sizes(given) -> list[tuple[str, str]]:
    usual = QUICK if given.quick else USUAL
    return [(name, getattr(given, name) or usual[name]) for name in USUAL]


def _model(given, device: str) -> str:
    if given.quick and given.model:
        raise UserError(
            f"--quick chooses its own model: leave out --model {given.model} or --quick"
        )
    usual = QUICK_MODEL if given.quick else "tiny" if device == "cpu" else "qwen2.5-0.5b"
    return _choice("--model", given.model, tuple(MODELS), usual)


def _micro_batch_size(given, sizes: dict[str, int]) -> int:
    if given.micro_batch_size is None:
        return sizes["trl_batch"]
    return whole("--micro-batch-size", given.micro_batch_size)


def _zero_stage(text: str | None, dtype: str) -> int:
    """Stage 0 adds up bf16 gradients in bf16; stage 1 in fp32, as TRL does."""
    usual = "0" if dtype == "fp32" else "1"
    return int(_choice("--zero-stage", text, ("0", "1", "2", "3"), usual))


def _ratio(given) -> float | None:
    if given.prompt_ratio is None:
        return None
    if given.data:
        raise UserError(
            f"--prompt-ratio {given.prompt_ratio} is about drawn pairs: leave out it or "
            f"--data {given.data}"
        )
    return positive("--prompt-ratio", given.prompt_ratio, below=math.inf)


def _liger(given, device: str) -> bool:
    if given.liger and (missing := LIGER.missing()):
        raise UserError(f"--liger: {missing}")
    if given.liger and device == "cpu" and not interpreting():
        raise UserError("--liger: its kernels are Triton's and need a GPU; leave it out on a CPU")
    return given.liger


def _divides(option: str, value: int, total: int) -> None:
    if total % value:
        raise UserError(
            f"{option} {value} does not divide --global-batch-size {total}; try "
            f"{next(n for n in range(min(value, total), 0, -1) if total % n == 0)}"
        )


def _contenders(given) -> tuple[Contender, ...]:
    selection = Selection.of(given, tuple(CONTENDERS))
    chosen = tuple(c for name, c in CONTENDERS.items() if selection.chosen(name))
    if not chosen:
        raise selection.nobody()
    return chosen


def _choice(option: str, text: str | None, known: tuple[str, ...], usual: str) -> str:
    if text is None or text == "auto":
        return usual
    if text not in known:
        raise UserError(f"{option} {text}: choose from {', '.join(known)}")
    return text


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
