"""A run saved and gone on with: what must be the same for it, and what may differ by rounding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.training import distributed
from dpo_fast.training.checkpoint_run import write_beside
from dpo_fast.training.checkpoints import (
    check_whole,
    find_checkpoint,
    fitting_state,
    load_checkpoint,
    read_state,
)
from dpo_fast.training.code_sources import STATE as CODE
from dpo_fast.training.code_sources import tell_changed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.longer import fits_longer, follow_schedule, goes_on
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.optimisers import TORCH, family
from dpo_fast.training.prepare import Plan, Run
from dpo_fast.training.reshard import fits_moved, load_moved, moved, other_groups, tell_moved
from dpo_fast.training.run_log import RunLog

# Options that a checkpoint brings back with DeepSpeed's optimiser and schedule. A resumed run would
# ignore a new value of them, so it is refused.
SAME_TRAIN = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
SAME_REFERENCE = ("provider", "mixup_alpha", "sync_steps")


def checkpoint_of(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, whole; None for a new run. Collective.

    Raises:
        UserError: it is damaged, or is none.
    """
    asked, output_dir = config.train.resume_from_checkpoint, config.train.output_dir
    folder = distributed.from_main(lambda: find_checkpoint(asked, output_dir))
    if folder is not None:
        check_whole(folder)
    elif asked:
        say(f"{output_dir} has no checkpoint to resume: the run begins at step 0")
    return folder


def save(
    run: Run,
    step: int,
    sums: MetricSums,
    to_evaluate: bool = False,
    more_state: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint after `step` steps; returns its folder. Collective.

    to_evaluate: whether an evaluation is due that a signal kept from ending.
    more_state: what state.json has beside.
    """
    ended = step == run.total_steps or run.best.exhausted
    state = {"step": step, "to_evaluate": to_evaluate, "ended": ended, **run.train.position(step)}
    run.saver.wait()  # the one before it may still need the best so far
    run.best.keep(step)
    run.saver.best = run.best.kept_name
    state |= {**must_fit(run), "rounding": rounding(run), **run.best.state(), **more_state}
    state |= {CODE: run.code} if run.code else {}
    more = partial(write_beside, run.config, run.model)
    return run.saver.save(
        run.engine, state, sums.values, run.stateful, more, named=run.best.writing()
    )


def resume(run: Run, checkpoint: Path, sums: MetricSums, log: RunLog) -> tuple[int, bool]:
    """Restore the run as it was, the open window of metrics included.

    Returns:
        The steps taken, and whether an evaluation is still due after them.
    """
    state = restore(run, checkpoint, sums)
    run.saver.goes_on_from(checkpoint, state)
    run.best.load(state, checkpoint, goes_on(run, state, checkpoint))
    log.calls.goes_on_from(checkpoint, state)
    log.begin(state["step"], resumed=True)
    say(f"resumed {checkpoint} at step {state['step']}")
    tell_changed(state.get(CODE, {}), run.code)
    if "rounding" in state:
        tell_rounding(state["rounding"], rounding(run))
    return state["step"], state.get("to_evaluate", False)


def restore(run: Run, checkpoint: Path, sums: MetricSums) -> dict[str, Any]:
    """Bring the run to where the checkpoint was written; returns the content of its state.json."""
    known = read_state(checkpoint)
    elsewhere = moved(known, must_fit(run))
    by_parts = elsewhere or other_groups(run.engine, checkpoint)
    if by_parts:
        check_by_parts(run.config, checkpoint)
    load = partial(load_moved, stage=run.config.zero_stage) if by_parts else load_checkpoint
    fits = must_be_same(run, checkpoint, known)
    state = load(run.engine, checkpoint, fits, sums.values, run.stateful)
    run.train.seek(state)
    if goes_on(run, known, checkpoint):
        follow_schedule(run, state)
    if "learning_rate" in run.config.train.change_on_resume:
        change_rate(run)
    if elsewhere:
        tell_moved(run, state)
    return state


def check_fits(checkpoint: Path, plan: Plan) -> None:
    """Raises UserError if a checkpoint is none of this run. Needs no model and no reference."""
    fitting_state(checkpoint, must_be_same(plan, checkpoint, read_state(checkpoint)))


def must_be_same(plan: Plan, checkpoint: Path, known: dict[str, Any]) -> dict[str, Any]:
    """`must_fit` without what may differ between a checkpoint and the run that goes on from it.

    known: the content of the checkpoint's state.json.
    """
    fits = must_fit(plan)
    for name in ("group_prompts", "model.router_aux_loss_coef", "train.sampler"):
        if name not in known and not fits[name]:
            del fits[name]  # the checkpoint is older than the option
    if "train.optim" not in known and fits["train.optim"] == TORCH:
        del fits["train.optim"]
    if moved(known, fits):
        check_by_parts(plan.config, checkpoint)
        fits = fits_moved(plan, checkpoint, known, fits)
    if goes_on(plan, known, checkpoint):
        fits = fits_longer(plan, known, fits)
    changed = {f"train.{name}" for name in plan.config.train.change_on_resume}
    return {name: value for name, value in fits.items() if name not in changed}


def check_by_parts(config: RunConfig, checkpoint: Path) -> None:
    """Raises UserError if the optimiser's states cannot be taken apart and go to other ranks."""
    if family(config.train.optim) != TORCH:
        raise UserError(
            f"{checkpoint} is of other ranks, another ZeRO stage or another sub_group_size, and the states "
            f"of train.optim={config.train.optim} do not go to others: they lie in blocks that several "
            "parameters share. Resume as it was written, or start a new run from its weights (dpo-fast "
            "export)"
        )


def change_rate(run: Run) -> None:
    """Go on with the learning rate of the configuration; the checkpoint has brought back the old one."""
    schedule, rate = run.engine.lr_scheduler, run.config.learning_rate
    before, schedule.base_lrs = schedule.base_lrs[0], [rate] * len(schedule.base_lrs)
    for group, share in zip(schedule.optimizer.param_groups, schedule.lr_lambdas):
        group["initial_lr"] = rate
        group["lr"] = rate * share(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
    say(f"train.learning_rate was {before:g} and is {rate:g} from here on")


def must_fit(run: Plan) -> dict:
    """What a resumed run must share with the interrupted one to be the same run, by name."""
    train, tree = run.config.train, run.config.resolved()
    fits = {
        "world_size": distributed.world_size(),
        **run.train.must_fit(),
        "total_steps": run.total_steps,
        "global_batch_size": train.global_batch_size,
        "tokens_per_batch": train.tokens_per_batch,
        "group_prompts": train.group_prompts,
        "seed": train.seed,
        "zero_stage": run.config.zero_stage,
    }
    own = getattr(run.train.sampler, "own", None)
    fits["train.sampler"] = None if own is None else own.identity
    fits |= {f"train.{name}": tree["train"][name] for name in SAME_TRAIN}
    fits["train.optim"] = family(train.optim)
    if train.warmup_steps is not None:  # under the name that older checkpoints know
        fits["train.warmup_ratio"] = f"{train.warmup_steps} steps"
    fits |= {f"loss.{name}": value for name, value in tree["loss"].items()}
    fits |= {f"reference.{name}": tree["reference"][name] for name in SAME_REFERENCE}
    fits |= {"model.dtype": tree["model"]["dtype"], "model.lora": _lora(tree["model"]["lora"])}
    fits["model.adapter"] = run.config.model.has_adapters
    fits["model.router_aux_loss_coef"] = run.config.model.router_aux_loss_coef or 0.0
    fits |= {f"the hash of {option}'s weights": value for option, value in run.weights.items()}
    if run.config.parallel.sequence_parallel > 1:
        fits["sequence_parallel"] = run.config.parallel.sequence_parallel
    if train.tokens_per_batch is not None:  # the tokens of an example depend on the layout
        # Versions that lack the last key counted tokens that answers have in common more than once.
        fits |= {"layout": train.layout, "tokens_counted": "once"}
    return fits


def _lora(options: dict | None) -> dict | None:
    """Options of adapters, as versions that lack the newest of them noted it where it is not used."""
    if options is None:
        return None
    first = ("r", "alpha", "dropout", "target_modules", "modules_to_save")
    unused = LoraSection().model_dump(mode="json")
    return {n: value for n, value in options.items() if n in first or value != unused.get(n)}


def rounding(run: Run) -> dict:
    """What a resumed run may change: results then differ by rounding alone. By the option's name."""
    train, model = run.config.train, run.config.model
    return {
        "train.micro_batch_size": train.micro_batch_size,
        "train.layout": train.layout,
        "train.implementation": train.implementation,
        "train.workspace_bytes": train.workspace_bytes,
        "model.attention": run.model.causal_lm.config._attn_implementation,
        "model.use_liger_kernel": model.use_liger_kernel,
        "model.torch_compile": model.torch_compile,
        "model.fp8": model.fp8,
    }


def tell_rounding(before: dict, now: dict) -> None:
    """A line for each option that was changed, of those that `rounding` gives."""
    for name, value in now.items():
        if before.get(name, value) != value:
            say(
                f"{name} was {before[name]} and is {value}: from here on the run differs by rounding "
                "from one that was not interrupted"
            )
