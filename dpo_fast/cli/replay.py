"""`dpo-fast replay`: a step of a run, row by row, as a table."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from dpo_fast.cli.export import split
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

WIDE = 10_000  # characters of a line


def run_replay(run: Path, step: str | None, overrides: list[str], nproc: int | None) -> None:
    """Replay the step and show its rows. nproc: local ranks; None: as many as the run had."""
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed
    from dpo_fast.training.console import quiet

    distributed.adopt_slurm()
    quiet()
    from dpo_fast.training.replay import find_step, replay

    step, overrides = split(step, overrides)
    asked = find_step(run, None if step is None else _number(step))
    if distributed.world_size() == 1:
        ranks = nproc or distributed.at_most(asked.world_size)
        if ranks > 1:
            arguments = ["replay", str(run), str(asked.step), *overrides]
            raise typer.Exit(launch(ranks, arguments))
    elif nproc is not None:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    rows = replay(asked, overrides)
    if distributed.is_main():
        console = Console()
        if not console.is_terminal:  # a file or a program reads it: nothing is cut
            console.width = WIDE
        console.print(table(rows))
    distributed.leave_distributed()


def _number(step: str) -> int:
    if not (step.isascii() and step.isdecimal() and 0 < len(step) < 10 and int(step)):
        raise UserError(f"step {quoted(step)}: expected a number, counted from 1")
    return int(step)


def table(rows: list) -> Table:
    """A line for each row of the batch."""
    made = Table("row", "loss", "log-probs", "rewards", "largest gradient", "not finite", box=None)
    for row in rows:
        logps, rewards = (", ".join(f"{x:.4g}" for x in each) for each in (row.logps, row.rewards))
        made.add_row(
            row.where, f"{row.loss:.4g}", logps, rewards, f"{row.largest:.3g}", row.fault or ""
        )
    return made
