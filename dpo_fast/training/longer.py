"""Training on after the end: the last checkpoint of a run that has ended, resumed with more steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.training.console import say
from dpo_fast.training.prepare import Plan, Run
from dpo_fast.training.schedule import rates_of


def goes_on(run: Plan, state: dict[str, Any], checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of a run that is to be longer now. state: of the checkpoint.

    Raises:
        UserError: the run is to be longer, but it has not ended there.
    """
    before, now = state.get("total_steps"), run.total_steps
    if not isinstance(before, int) or now <= before:
        return False
    if not state.get("ended", state["step"] == before):
        raise UserError(
            f"{checkpoint} is step {state['step']} of a run of {before} steps, and train.max_steps or "
            f"train.num_train_epochs makes it {now}: a run that has not ended goes on as it began. Set it "
            "back and finish it; then its last checkpoint can be trained on"
        )
    return True


def fits_longer(run: Plan, state: dict[str, Any], fits: dict[str, Any]) -> dict[str, Any]:
    """`fits` as the shorter run had it: its length, and what it drew of a mixture.

    The examples that its epochs drew are those that the first epochs of the longer run draw.
    """
    split, fits = run.train, fits | {"total_steps": state["total_steps"]}
    if getattr(split.examples, "mixture", None) is None or "data" not in state:
        return fits
    epochs = -(-state["total_steps"] // split.sampler.steps_per_epoch)
    for number in (epochs, epochs + 1):  # a part of an epoch may be less than a step
        drawn = split.examples.narrowed(run.config.train.seed, number)
        if drawn.fingerprint == state["data"]:
            return fits | {"data": state["data"]}
    return fits


def follow_schedule(run: Run, state: dict[str, Any]) -> None:
    """Let the next step have the rate of the longer run's schedule, and say what that means."""
    schedule, peak = run.config.train.schedule, run.config.learning_rate
    step, before, now = state["step"], state["total_steps"], run.total_steps
    longer, shorter = rates_of(schedule, peak, now), rates_of(schedule, peak, before)
    scheduler = run.engine.lr_scheduler
    for group in scheduler.optimizer.param_groups:
        group["lr"] = longer(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    exact = all(longer(each) == shorter(each) for each in range(step))
    say(
        f"the run of {before} steps ended after {step}; it goes on to {now}. Step {step + 1} has the "
        f"learning rate {longer(step):.3g}, as in a run of {now} steps with {schedule}"
        + (
            ": it ends as if it had been that long from the beginning"
            if exact
            else f"; the steps before had those of a run of {before}, the last {shorter(step - 1):.3g}"
        )
    )
