"""Options that both benchmarks share, contenders by name or pattern, and the packages of the peers.

An option that cannot be honoured is an error that names it, its value and the remedy. No peer's package is
needed: a missing one is named, with the command that installs it.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from dpo_fast.errors import UserError

NAMES = {"metavar": "NAME", "action": "append"}
COMMON = {  # options that mean the same in both
    "--only": NAMES | {"help": "these contenders; * matches any text"},
    "--skip": NAMES | {"help": "without these contenders"},
    "--device": {"metavar": "NAME", "help": "cpu or cuda (default: cuda where there is one)"},
    "--plots": {
        "metavar": "FOLDER",
        "help": "draw the rows here; without --csv keep them here too",
    },
    "--no-memory": {"action": "store_true", "help": "leave out the peak memory"},
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors. Values stay text until they are checked by name."""

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
    """The value of an option that takes a whole number, 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"{option} {text}: expected a whole number, 1 or more")
    return value


def positive(option: str, text: str, below: float | None = None) -> float:
    """The value of an option that takes a number greater than 0, and less than `below` if given."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0 or (below is not None and value >= below):
        raise UserError(f"{option} {text}: expected a number greater than 0")
    return value


@dataclass(frozen=True)
class Selection:
    """Contenders that match a pattern of `only` (all if it is empty) and none of `skip`."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, given, known: Sequence[str]) -> Selection:
        """From --only and --skip. Raises UserError for a pattern that matches no known name."""
        return cls(_matching("--only", given.only, known), _matching("--skip", given.skip, known))

    def asked(self, name: str) -> bool:
        """Whether --only has the name itself: a pattern does not ask for what takes minutes."""
        return name in self.only

    def chosen(self, name: str) -> bool:
        return (not self.only or _any(name, self.only)) and not _any(name, self.skip)

    def nobody(self) -> UserError:
        """The error for a selection that leaves no contender."""
        return UserError(
            f"--only {' '.join(self.only) or '*'} --skip {' '.join(self.skip) or 'nothing'} "
            "leave no contender: choose others"
        )


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _matching(option: str, patterns: list[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns or ():
        if not fnmatch.filter(known, pattern):
            close = difflib.get_close_matches(pattern, known, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose from: {'; '.join(known)}"
            raise UserError(f"{option} {pattern!r} matches no contender; {remedy}")
    return tuple(patterns or ())


@dataclass(frozen=True)
class Package:
    """A peer's package.

    name: of the distribution.
    module: top level, to see whether it is installed.
    pip: the command that installs it.
    heavy: modules that take seconds to import.
    needs: a module of another package that it does not always come with.
    """

    name: str
    module: str
    pip: str
    heavy: tuple[str, ...] = ()
    needs: str | None = None

    def missing(self) -> str | None:
        """How to install it, None if it is installed."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.name} is not installed: {self.pip}"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.name} is there, but not {self.needs}, which it needs: {self.pip}"
        return None

    def lacks(self, file: str) -> str | None:
        """How to upgrade it where it is too old to have a file; None if it has it. It is installed."""
        folders = importlib.util.find_spec(self.module).submodule_search_locations
        if any((Path(folder) / file).is_file() for folder in folders):
            return None
        return f"{self.version()} has no {file}: upgrade it: {self.pip}"

    def version(self) -> str:
        """Name and version, "" if it is not installed."""
        found = machine.version(self.name)
        return f"{self.name} {found}" if found else ""


TRL = Package(
    "trl", "trl", 'pip install "trl>=1.16,<1.17"', heavy=("trl.kernels", "trl.trainer.utils")
)
LIGER = Package(
    "liger-kernel",
    "liger_kernel",
    'pip install "liger-kernel>=0.8.5"',
    heavy=("liger_kernel.chunked_loss",),
)
CCE = Package("cut-cross-entropy", "cut_cross_entropy", "pip install cut-cross-entropy")
QUACK = Package("quack-kernels", "quack", 'pip install "quack-kernels>=0.6.5"', needs="cutlass")
