"""What comes after a run, from Python and the command line: its report, the card's pictures, the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig


@dataclass(frozen=True)
class Ending:
    """The page of a run, and the address of its model on the hub; None for what there is not."""

    report: Path | None = None
    pushed: str | None = None


def finish(
    config: RunConfig, model: Path, tell: Callable[[str], None], fail: Callable[[str], None]
) -> Ending:
    """Write the report of a run that is over, and push its model if that is asked for. Collective.

    Rank 0 does it. The others wait however long it takes, and have an empty Ending: a job ends with its
    last rank, and a collective of theirs would not wait so long. The run has done its work even where
    something fails: nothing is raised.

    model: the folder of the trained model. tell: gets a line for each. fail: gets what failed, in words.
    """
    report = _report(config, tell, fail) if distributed.is_main() else None
    return Ending(report, push_the_end(config, model, tell, fail))


def _report(config: RunConfig, tell: Callable, fail: Callable) -> Path | None:
    from dpo_fast.report import write_report
    from dpo_fast.report.card import illustrate

    folder = Path(config.train.output_dir)
    try:
        page = write_report(folder)
        tell(f"report: {page}")
        illustrate(folder)
    except UserError as error:
        fail(f"the run is complete, its report is not: {error}")
        return None
    return page


def push_the_end(
    config: RunConfig, model: Path, tell: Callable[[str], None], fail: Callable[[str], None]
) -> str | None:
    """The model of a run that is over to the hub, if that is asked for; the rest as `finish`."""
    address = None
    if config.train.push_to_hub and distributed.is_main():
        address = _pushed(config, model, tell, fail)
    distributed.await_all("the end")
    return address


def _pushed(config: RunConfig, model: Path, tell: Callable, fail: Callable) -> str | None:
    from dpo_fast.training.console import say
    from dpo_fast.training.hub import push_run, push_run_again

    # Before it begins: whoever ends a long upload, or a scheduler that does, has the command.
    say(f"the run is complete; pushing its model (later with `{push_run_again(config, model)}`)")
    try:
        address = push_run(config, model)
    except UserError as error:
        fail(f"the run is complete, its model is not pushed: {error}")
        return None
    tell(f"pushed: {address}")
    return address
