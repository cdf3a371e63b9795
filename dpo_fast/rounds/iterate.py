"""`dpo-fast iterate`: the stages of a file, one after the other, each complete or gone on with."""

from __future__ import annotations

from functools import partial

from dpo_fast.errors import UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.rounds import records
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import AVERAGE, Plan, Step
from dpo_fast.rounds.rows import check_prompts, check_rounds, judge_of
from dpo_fast.rounds.servers import unreached
from dpo_fast.rounds.stage import GOES_ON, modules_passed_over, told, work
from dpo_fast.training import distributed, signals
from dpo_fast.training.checkpoints import checkpoints
from dpo_fast.training.console import say
from dpo_fast.training.fit import check_run, choose
from dpo_fast.training.hub import check_hub, open_repo
from dpo_fast.training.load_data import load_split
from dpo_fast.training.lock import sole_run
from dpo_fast.training.places import check_places, check_writable


def iterate(config: RoundsConfig, where: str = "the file", dry_run: bool = False) -> Plan:
    """Do all stages that are not complete. Collective. Returns what they were.

    where: the file, for errors. dry_run: check all that can be checked, and do nothing.

    Raises:
        UserError: something does not fit, or was edited since a stage was made.
        Interrupted: after a signal; the same configuration goes on.
    """
    plan = Plan(config, where)
    check_stages(plan)
    first = plan.rehearsal(plan.steps[0])
    with signals.stop_at_once(GOES_ON):
        distributed.init_distributed(first.parallel.timeout_minutes)
        with sole_run(config.output_dir, "output_dir"):
            distributed.from_main(partial(check_made, plan))
            left = [step for step in plan.steps if not records.is_complete(step)]
            say(f"{len(plan.steps)} steps, {len(plan.steps) - len(left)} of them complete")
            distributed.from_main(partial(check_needed, plan, left))
            for step in left:
                check_data(plan, step)
            if left and not dry_run:
                last, begun = plan.rehearsal(plan.steps[-1]), len(left) < len(plan.steps)
                distributed.from_main(lambda: open_repo(last, begun))
                with modules_passed_over():
                    for step in left:
                        work(plan, step)
    return plan


def check_stages(plan: Plan) -> None:
    """Check all that the file alone tells of every stage, before hours are spent on the first.

    Raises:
        UserError: what a stage's run would say when it came to it.
    """
    check_writable(plan.config.output_dir, "output_dir")
    check_hub(plan.rehearsal(plan.steps[-1]))
    for step in plan.steps:
        if step.round > 1 or records.is_complete(step):
            continue
        run = plan.rehearsal(step)
        with told(step):
            if step.stage.samples:
                check_rounds(plan, step)
            else:
                check_places(run)
            check_run(run)


def check_needed(plan: Plan, left: list[Step]) -> None:
    """Raises UserError if a step goes on from what was removed of a complete one. Rank 0 calls."""
    complete = [step for step in plan.steps if step not in left]
    for step in left:
        before, needed = plan.before(step), {plan.begins_with(step).path, plan.policy(step).path}
        if plan.compares(step):
            needed |= set(plan.averages(step) or [plan.reference(step)])
        for made in complete:
            for path in (made.model, made.folder / AVERAGE):
                if str(path) in needed and not path.is_dir():
                    raise UserError(
                        f"{plan.where}: {step.option} needs {path}, which is not there: put it back, or "
                        f"remove {made.name} and what follows it to make them anew"
                    )
        carried = step.stage.optimizer == "carried" and not checkpoints(step.run)
        if carried and before in complete and not checkpoints(before.run):
            raise UserError(
                f"{plan.where}: {step.option}.optimizer=carried goes on from the last checkpoint of "
                f"{before.name}, and {before.run} has none any more: put it back, or set fresh"
            )


def check_data(plan: Plan, step: Step) -> None:
    """Read and tokenise the data of a stage, or find it done: it is needed later anyway. Collective."""
    run = plan.rehearsal(step)
    if step.round > 1 or run.data.streaming:
        return
    with told(step):
        run = choose(run).applied(run)
        tokenizer = load_tokenizer(run.model)
        if not step.stage.samples:
            for name in ("train", "eval") if run.data.has_eval else ("train",):
                load_split(run, tokenizer, name, shuffle=False)
            return
        rounds = plan.rounds(step, plan.config.model)
        check_prompts(rounds)
        for each in distributed.from_main(partial(unreached, rounds)):
            say(f"{step.name}: {each}; it is needed when this stage comes", matters=True)
        if run.data.eval is None:
            return
        alone = run.data.model_copy(update={"train": run.data.eval, "eval": None})
        try:  # by itself: the pairs are yet to be made
            load_split(run.model_copy(update={"data": alone}), tokenizer, "train", shuffle=False)
        except UserError as error:
            raise UserError(str(error).replace("data.train", "data.eval")) from None


def check_made(plan: Plan) -> None:
    """Compare what is there with the file. Rank 0 calls.

    Raises:
        UserError: a stage was made with other options, data or models; or one before it is missing.
    """
    missing: Step | None = None
    for step in plan.steps:
        done, begun = (records.read(step, name) for name in (records.DONE, records.BEGUN))
        if missing is not None and (done or begun):
            raise UserError(
                f"{plan.where}: {step.folder} goes on from {missing.name}, which is not complete: put that "
                f"back, name another output_dir, or remove {step.name} and what follows it"
            )
        if done is None:
            missing = missing or step
        else:
            check_complete(plan, step, done)


def check_complete(plan: Plan, step: Step, record: dict) -> None:
    """Compare a complete step with its record: options, data, judge, files, and models that are there."""
    now = {
        "options": records.options(plan, step),
        "models": records.models(plan, step, plan.run(step), complete=True),
        "data": records.data(plan, step, complete=True),
    }
    if step.stage.samples:
        now["judge"] = judge_of(plan.rounds(step, plan.config.model), complete=True)
    records.check_same(plan, step, record["made_with"], now)
    records.check_files(plan, step, record)
