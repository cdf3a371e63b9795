"""`dpo-fast doctor` for a file of stages: what the run of each would use."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_fast.cli.doctor_run import Outlook, look
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan


def outlooks_of(config: RoundsConfig, where: str) -> Iterator[tuple[str, Outlook]]:
    """Name and outlook of each stage's run. A model that is yet to be made is taken to be as the start.

    where: the file, for errors.

    Raises:
        UserError: what `iterate` would say of this file before it loads a weight or data.
    """
    plan = Plan(config, where)
    for step in plan.steps:
        if step.round < 2:  # other rounds are as the first
            yield step.name, look(plan.rehearsal(step))
