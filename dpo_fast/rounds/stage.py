"""One step of `iterate`, from what it begins with to its record. Every part of it may be interrupted."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dpo_fast.errors import Interrupted, Unhealthy, UserError
from dpo_fast.rounds import records
from dpo_fast.rounds.average import write_average
from dpo_fast.rounds.judge import NoPairs
from dpo_fast.rounds.plan import AVERAGE, Plan, Step
from dpo_fast.rounds.progress import last_metrics
from dpo_fast.rounds.rows import MADE, make_rows
from dpo_fast.rounds.sample_folder import LOGPS
from dpo_fast.rounds.stored import fill_references
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import checkpoints
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
        made = rows_of(plan, step) if step.stage.samples else None
        release_memory()
        if not distributed.from_main(step.model.exists):
            run = plan.run(step)
            fill_references(run, *known_logps(plan, step))
            with judge_of_the_file(plan):
                train(run)
        release_memory()
        told_of = {"rows": made, "seconds": round(time.monotonic() - began, 1)}
        distributed.from_main(lambda: finish(plan, step, made_with, told_of))


def rows_of(plan: Plan, step: Step) -> dict[str, Any]:
    """Sample, judge and pair, as `make_rows`. A later round may have nothing left to learn from."""
    try:
        return make_rows(plan.rounds(step))
    except NoPairs as error:
        before = plan.before(step)
        if before is None:
            raise
        end = f"{step.option}.rounds={step.round - 1}" if step.round > 1 else f"no {step.option}"
        raise UserError(
            f"{error}. If the policy has nothing more to learn from these prompts, end with {before.name}: "
            f"{end}"
        ) from None


def known_logps(plan: Plan, step: Step) -> tuple[list[Path], list[Path]]:
    """Files with log-probs of the answers, and folders of references that earlier steps have stored."""
    earlier = [each.run / "reference" for each in plan.steps[: plan.steps.index(step)]]
    file = step.folder / LOGPS
    return [file] if file.is_file() else [], [each for each in earlier if each.is_dir()]


def begin(plan: Plan, step: Step) -> dict[str, Any]:
    """Note what a step is made with, or compare with the note of the last time. Returns it.

    Before its first checkpoint a step may be mended: samples, scores and pairs know what made them.
    """
    now, before = records.made_with(plan, step), records.read(step, records.BEGUN)
    mixture, average = plan.averages(step), step.folder / AVERAGE
    if before is not None and (checkpoints(step.run) or step.model.exists()):
        records.check_same(plan, step, before["made_with"], now)
    elif before is not None and records.of_average(before["made_with"]) != records.of_average(now):
        shutil.rmtree(average, ignore_errors=True)
    if before is None or before["made_with"] != now:
        records.write(step, records.BEGUN, {"made_with": now})
    if mixture is not None and not average.exists():
        reference, policy = mixture
        told = (step.stage.mixup_alpha, plan.named(policy), plan.named(reference))
        say("the reference is {:g} of {}, and the rest of {}".format(*told))
        write_average(reference, policy, step.stage.mixup_alpha, average)
    return now


def finish(plan: Plan, step: Step, made_with: dict[str, Any], told_of: dict[str, Any]) -> None:
    """Write the record that makes a step complete. told_of: what it tells beside what is in the folder."""
    names = [name for name in MADE if (step.folder / name).is_file()]
    content = {
        "made_with": made_with,
        "model": str(step.model.relative_to(step.folder)),
        "identity": identity_on_this_rank(plan.rehearsal(step), str(step.model)),
        "files": records.files_of(step, names),
        "metrics": last_metrics(step),
        **told_of,
    }
    records.write(step, records.DONE, content)


@contextlib.contextmanager
def modules_passed_over() -> Iterator[None]:
    """Let collections of garbage inside look at what is made inside, and not at all modules each time.

    Those of torch, transformers and DeepSpeed have a million objects, and a step collects several times.
    A process that passes them over already goes on with that.
    """
    passed_over = gc.get_freeze_count() > 0
    gc.collect()
    if not passed_over:
        gc.freeze()
    try:
        yield
    finally:
        if not passed_over:
            gc.unfreeze()


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
def judge_of_the_file(plan: Plan) -> Iterator[None]:
    """Let errors name the section judge, where it is what scores held-out answers, too."""
    try:
        yield
    except UserError as error:
        if "judge" in plan.config.generate:
            raise
        raise UserError(str(error).replace("generate.judge.", "judge.")) from None


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
