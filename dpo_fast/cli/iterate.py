"""`dpo-fast iterate`: stages of training, one after the other."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpo_fast.cli.config import Config, Overrides
from dpo_fast.cli.later import import_when_used
from dpo_fast.errors import UserError
from dpo_fast.training.config_file import read_tree

SECTIONS = (
    *("output_dir", "model", "data", "sample", "judge", "pairs", "stages", "loss", "reference"),
    *("train", "parallel", "log", "health", "generate"),
)
REPORT = "report.html"


def load_rounds(config: str, overrides: list[str] | None):
    """The file of `sample`, `judge` and `iterate` as a RoundsConfig. Raises UserError."""
    tree = read_tree(config, overrides or (), SECTIONS)
    import_when_used("torch")
    from dpo_fast.rounds.config import RoundsConfig
    from dpo_fast.training.config import build

    return build(RoundsConfig, tree, config)


def iterate(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
    status: Annotated[
        bool, typer.Option("--status", help="show what is done and what comes, and end")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check all stages and their data, then end")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="show findings, errors and the result, nothing else")
    ] = False,
) -> None:
    """Train in stages: sDPO, iterated DPO, DNO, SFT then DPO. Interrupted, the same command goes on.

    Alone, with --nproc, or under torchrun, deepspeed or srun. docs/ROUNDS.md has the file. Exit codes: as
    `train`.
    """
    from dpo_fast.progress import hush
    from dpo_fast.training import console, distributed

    rounds = load_rounds(config, overrides)
    console.quiet()
    hush(quiet)
    if status:
        from dpo_fast.rounds.plan import Plan

        show_steps(Plan(rounds, config))
        return
    distributed.adopt_slurm()
    if nproc > 1:
        flags = ["--dry-run"] * dry_run + ["--quiet"] * quiet
        _launch(nproc, ["iterate", config, *(overrides or ()), *flags])
    from dpo_fast.rounds.iterate import iterate as iterate_stages

    plan = iterate_stages(rounds, config, dry_run)
    if distributed.is_main() and not dry_run:
        show_steps(plan)
        typer.echo(f"model: {plan.steps[-1].model}")
        _report(plan)
    if not dry_run:
        _push(plan)
    distributed.leave_distributed()


def show_steps(plan) -> None:
    """A table of the steps: which are complete, and how far the others are."""
    from dpo_fast.rounds.progress import progress_of
    from dpo_fast.rounds.stage import summary

    table = Table("step", "state", "what it does", "what is there", box=None, pad_edge=False)
    for each in progress_of(plan):
        table.add_row(each.step.name, each.state, summary(plan, each.step), each.told)
    Console().print(table)


def _launch(nproc: int, arguments: list[str]) -> None:
    """Run the same command as local ranks and exit with their code."""
    import os

    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed

    if distributed.world_size() > 1:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    code = launch(nproc, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _push(plan) -> None:
    """The last model to the hub, if the section train asks for it. Collective."""
    from dpo_fast.cli.push import push_the_end
    from dpo_fast.report.card import illustrate
    from dpo_fast.training import distributed

    last = plan.steps[-1]
    if distributed.is_main():
        with contextlib.suppress(UserError):  # the report has told it
            illustrate(last.run)
    push_the_end(plan.run(last), last.model)


def _report(plan) -> None:
    """One page over all steps. The work is done even where there is no room for it."""
    from dpo_fast.report import write_comparison, write_report
    from dpo_fast.report.compare import MOST_RUNS

    folders = [step.run for step in plan.steps if (step.run / "metrics.jsonl").is_file()]
    out = Path(plan.config.output_dir) / REPORT
    try:
        last = folders[-MOST_RUNS:]
        page = write_report(last[0], out) if len(last) == 1 else write_comparison(last, out, True)
        typer.echo(f"report: {page}")
    except UserError as error:
        print(f"dpo-fast: the stages are complete, their report is not: {error}", file=sys.stderr)
