"""The options of `bench train`. One that cannot be honoured is an error with its name, value and remedy."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cli import LIGER, Parser, Selection, choose_device, positive, whole
from benchmarks.results import Output
from benchmarks.train.case import CONTENDERS, MODELS, Contender
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
