"""`dpo-fast replay`: a step of a run, row by row, as a table."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

WIDE = 10_000  # characters of a line


def run_replay(run: Path, step: int | None, overrides: list[str]) -> None:
    """Replay the step on as many ranks as the run had, and show its rows."""
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed
    from dpo_fast.training.console import quiet

    distributed.adopt_slurm()
    quiet()
    from dpo_fast.training.replay import find_step, replay

    asked = find_step(run, step)
    if asked.world_size > 1 and distributed.world_size() == 1:
        arguments = ["replay", str(run), str(asked.step), *overrides]
        raise typer.Exit(launch(asked.world_size, arguments))
    rows = replay(asked, overrides)
    if distributed.is_main():
        console = Console()
        if not console.is_terminal:  # a file or a program reads it: nothing is cut
            console.width = WIDE
        console.print(table(rows))
    distributed.leave_distributed()


def table(rows: list) -> Table:
    """A line for each row of the batch."""
    made = Table("row", "loss", "log-probs", "rewards", "largest gradient", "not finite", box=None)
    for row in rows:
        logps, rewards = (", ".join(f"{x:.4g}" for x in each) for each in (row.logps, row.rewards))
        made.add_row(
            row.where, f"{row.loss:.4g}", logps, rewards, f"{row.largest:.3g}", row.fault or ""
        )
    return made
