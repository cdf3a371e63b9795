"""What the options of both benchmarks share. One that cannot be honoured is an error that names it, its
value and the remedy; nothing is ignored."""

from __future__ import annotations

import argparse

import torch

from dpo_fast.errors import UserError

COMMON = {  # options that mean the same in both
    "--only": {
        "metavar": "NAME",
        "action": "append",
        "help": "these contenders; * matches any text",
    },
    "--skip": {"metavar": "NAME", "action": "append", "help": "without these contenders"},
    "--device": {"metavar": "NAME", "help": "cpu or cuda (default: cuda where there is one)"},
    "--plots": {
        "metavar": "FOLDER",
        "help": "draw the rows here; without --csv keep them here too",
    },
    "--no-memory": {"action": "store_true", "help": "leave out the peak memory"},
}


class Parser(argparse.ArgumentParser):
    """Mistakes are a UserError, as everywhere. Texts stay text: each option is checked by its own name."""

    def __init__(self, name: str, usage: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=usage, formatter_class=form)

    def add_common(self, *options: str) -> None:
        for option in options:
            self.add_argument(option, **COMMON[option])

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the options")


def choose_device(name: str | None) -> str:
    there = torch.cuda.is_available()
    if name is None:
        return "cuda" if there else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu or cuda")
    if name == "cuda" and not there:
        raise UserError(
            "--device cuda: this torch sees no GPU; install a CUDA build, or choose --device cpu"
        )
    return name


def whole(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"{option} {text}: expected a whole number, 1 or more")
    return value


def positive(option: str, text: str, below: float | None = None) -> float:
    """A number greater than 0; infinity is one, unless it has to be `below` that."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0 or (below is not None and value >= below):
        raise UserError(f"{option} {text}: expected a number greater than 0")
    return value
