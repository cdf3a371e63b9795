"""`dpo-fast doctor` for a file of stages: what the run of each would use."""

from __future__ import annotations

from rich.console import Console

from dpo_fast.cli.doctor_run import render_run
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan


def render_stages(console: Console, config: RoundsConfig, where: str) -> None:
    """Print the tables of each stage's run; a model that is yet to be made is taken to be as the start.

    where: the file, for errors.

    Raises:
        UserError: what `iterate` would say of this file before it loads a weight or data.
    """
    plan = Plan(config, where)
    for step in plan.steps:
        if step.round < 2:  # other rounds are as the first
            console.rule(step.name)
            render_run(console, plan.rehearsal(step))
