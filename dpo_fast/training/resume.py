"""A run's checkpoints: what they hold, and what a run that goes on from one must share with it."""

from __future__ import annotations

from pathlib import Path

from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import load_checkpoint, save_checkpoint
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run
from dpo_fast.training.progress import say
from dpo_fast.training.run_log import RunLog

# Of what DeepSpeed restores with its optimiser a new value would be ignored; the others would make
# another run of it halfway.
SAME_TRAIN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
SAME_REFERENCE = ("provider", "mixup_alpha", "sync_steps")


def must_fit(run: Run) -> dict:
    """What a resumed run must share with the one that was interrupted, to be the same run."""
    train, tree = run.config.train, run.config.resolved()
    fits = {
        "world_size": distributed.world_size(),
        **run.train.must_fit(),
        "total_steps": run.total_steps,
        "global_batch_size": train.global_batch_size,
        "tokens_per_batch": train.tokens_per_batch,
        "seed": train.seed,
        "zero_stage": run.config.parallel.zero_stage,
    }
    fits |= {f"train.{name}": tree["train"][name] for name in SAME_TRAIN}
    fits |= {f"loss.{name}": value for name, value in tree["loss"].items()}
    fits |= {f"reference.{name}": tree["reference"][name] for name in SAME_REFERENCE}
    fits |= {"model.dtype": tree["model"]["dtype"], "model.lora": tree["model"]["lora"]}
    if train.tokens_per_batch is not None:  # what a pair takes depends on the layout
        fits["layout"] = train.layout
    return fits


def resume(run: Run, checkpoint: Path, sums: MetricSums, log: RunLog) -> int:
    """Everything as it was when the checkpoint was written, the open window of metrics included."""
    state = load_checkpoint(run.engine, checkpoint, must_fit(run), sums.values, run.stateful)
    run.train.seek(state)
    log.forget_after(state["step"])
    say(f"resumed {checkpoint} at step {state['step']}")
    return state["step"]


def save(run: Run, step: int, sums: MetricSums) -> Path:
    """A checkpoint of this step."""
    train = run.config.train
    state = {"step": step, **run.train.position(step), **must_fit(run)}
    return save_checkpoint(
        run.engine, train.output_dir, state, sums.values, train.save_total_limit, run.stateful
    )
