"""One step of `iterate`, from what it begins with to its record. Every part of it may be interrupted."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch

from dpo_fast.errors import Interrupted, Unhealthy, UserError
from dpo_fast.rounds import records
from dpo_fast.rounds.average import write_average
from dpo_fast.rounds.plan import PAIRS, SCORES, Plan, Step
from dpo_fast.rounds.progress import last_metrics
from dpo_fast.training import distributed
from dpo_fast.training.console import say
from dpo_fast.training.loop import train
from dpo_fast.training.weights import identity_on_this_rank

GOES_ON = "what is done is kept, and the same command goes on"


def work(plan: Plan, step: Step) -> None:
    """Do what is left of a step. Collective.

    Raises:
        UserError: the step was begun with something else, or what its parts say.
        Interrupted: after a signal. Unhealthy: after a finding that health.stop_on names.
    """
    began = time.monotonic()
    say(f"{step.name}: {summary(plan, step)}", matters=True)
    with told(step):
        made_with = distributed.from_main(lambda: begin(plan, step))
        if not step.model.exists():
            train(plan.run(step))
        release_memory()
        distributed.from_main(lambda: finish(plan, step, made_with, time.monotonic() - began))


def begin(plan: Plan, step: Step) -> dict[str, Any]:
    """Note what a step is made with, or compare with the note of the last time. Returns it."""
    now, before = records.made_with(plan, step), records.read(step, records.BEGUN)
    if before is None:
        records.write(step, records.BEGUN, {"made_with": now})
    else:
        records.check_same(plan, step, before["made_with"], now)
    mixture = plan.averages(step)
    if mixture is not None and not (step.folder / "reference-model").exists():
        reference, policy = mixture
        told = (step.stage.mixup_alpha, plan.named(policy), plan.named(reference))
        say("the reference is {:g} of {}, and the rest of {}".format(*told))
        write_average(reference, policy, step.stage.mixup_alpha, step.folder / "reference-model")
    return now


def finish(plan: Plan, step: Step, made_with: dict[str, Any], seconds: float) -> None:
    """Write the record that makes a step complete."""
    names = [name for name in (PAIRS, SCORES) if (step.folder / name).is_file()]
    content = {
        "made_with": made_with,
        "model": str(step.model.relative_to(step.folder)),
        "identity": identity_on_this_rank(plan.rehearsal(step), str(step.model)),
        "files": records.files_of(step, names),
        "metrics": last_metrics(step),
        "seconds": round(seconds, 1),
    }
    records.write(step, records.DONE, content)


def release_memory() -> None:
    """Give back what the last part held: models and engines refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(plan: Plan, step: Step) -> str:
    """What a step does, in a line."""
    run, stage = plan.rehearsal(step), step.stage
    reads = f"round {step.round} of {stage.rounds}, sampled" if stage.samples else run.data.train
    compares = f", reference {stage.reference}" if run.reference_spec.compares else ""
    losses, begins = ", ".join(run.loss.names), plan.named(plan.begins_with(step).path)
    return (
        f"{reads}, from {begins}, loss {losses}{compares}, learning rate {run.learning_rate:g}, "
        f"optimiser {stage.optimizer}"
    )


@contextlib.contextmanager
def told(step: Step) -> Iterator[None]:
    """Let errors say in which step they came, and how that goes on."""
    try:
        yield
    except Unhealthy as stop:
        raise Unhealthy(f"{step.name}: {stop}") from None
    except Interrupted:
        raise Interrupted(f"interrupted in {step.name}; {GOES_ON}") from None
    except UserError as error:
        raise UserError(f"{step.name}: {error}") from None
