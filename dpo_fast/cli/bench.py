"""`dpo-fast bench ...`: the benchmarks of a checkout. They are not in the wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

import dpo_fast
from dpo_fast.errors import UserError

app = typer.Typer(help="Measure, on this machine.", no_args_is_help=True)
# benchmarks/*/run.py defines the options once, and answers --help and mistakes.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(context_settings=PASS_ON, add_help_option=False)
def kernels(context: typer.Context) -> None:
    """Every implementation of the loss head, checked and timed side by side; --help for options."""
    _measure("kernels", context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Whole training steps, ours and TRL's, checked and timed side by side; --help for options."""
    _measure("train", context.args)


def _measure(benchmark: str, arguments: list[str]) -> None:
    code = _module("benchmarks.run", checkout()).main([benchmark, *arguments])
    if code:
        raise typer.Exit(code)


def checkout() -> Path:
    """The folder with benchmarks/: beside the package (an editable install), or the current folder."""
    beside, here = Path(dpo_fast.__file__).resolve().parents[1], Path.cwd()
    for folder in (beside, here):
        if (folder / "benchmarks" / "run.py").is_file() and (folder / "dpo_fast").is_dir():
            return folder
    raise UserError(
        f"bench needs benchmarks/, which is not in the wheel and neither in {here}: "
        "run it in a checkout of dpo_fast, or install one with pip install --editable ."
    )


def _module(name: str, root: Path):
    """Import from the checkout. Raises UserError if another package of that name comes first."""
    sys.path.insert(0, str(root))
    found = importlib.import_module(name)
    if not Path(found.__file__).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"another package named benchmarks hides {root / 'benchmarks'}: uninstall it, or run "
            f"python -m {name} with PYTHONPATH={root}"
        )
    return found
