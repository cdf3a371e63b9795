"""A dry run: all that comes before the first step, and no further."""

from __future__ import annotations

from pathlib import Path

from dpo_fast.training.console import say
from dpo_fast.training.first_batches import compare_at_start
from dpo_fast.training.longer import goes_on
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run
from dpo_fast.training.resume import restore


def rehearse(run: Run, checkpoint: Path | None) -> None:
    """All that is left to check before the first step. Takes none, and writes nothing. Collective.

    Raises:
        UserError: what the run itself would say there.
    """
    step = 0
    if checkpoint is not None:
        state = restore(run, checkpoint, MetricSums(run.engine.device))
        step = state["step"]
        run.best.load(state, checkpoint, goes_on(run, state, checkpoint))
        if step >= run.total_steps or run.best.exhausted:
            tell_ended(run, checkpoint, step)
            return
        say(f"{checkpoint} fits: the run would go on after step {step}")
    else:
        compare_at_start(run)
    split, number = run.train.at(step)
    batches = list(split.batches(number))
    say(
        f"dry run: the next step would have {len(batches)} micro-batches on this rank, of at most "
        f"{max(batch.input_ids.numel() for batch in batches):,} tokens. Nothing was trained, and nothing "
        f"written to {run.config.train.output_dir} but what was computed of the reference; the same "
        "command without --dry-run trains",
        matters=True,
    )


def tell_ended(run: Run, checkpoint: Path, step: int) -> None:
    """A line on a run that has no next step."""
    early = "" if step >= run.total_steps else ", early,"
    option = (
        "train.early_stopping_patience" if early else "train.max_steps or train.num_train_epochs"
    )
    say(
        f"dry run: the run ended{early} after step {step} of {run.total_steps}, and {checkpoint} fits: "
        f"no step is left. Without --dry-run its model is exported again; a larger {option} trains on. "
        "Nothing was written",
        matters=True,
    )
