"""`dpo-fast replay`: a step of a run once more, row by row, from the last checkpoint before it.

Steps between the checkpoint and it are taken again. Nothing of the run is changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.checkpoints import PREFIX, checkpoints
from dpo_fast.training.config import build_config
from dpo_fast.training.config_file import apply
from dpo_fast.training.console import say, track
from dpo_fast.training.earlier_run import NONFINITE, REPLAYED
from dpo_fast.training.examine import Row, examine, where_nan
from dpo_fast.training.finite import Place
from dpo_fast.training.fit import check_run
from dpo_fast.training.loop import update
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.nonfinite import findings, write_rows
from dpo_fast.training.overrides import check_used
from dpo_fast.training.prepare import prepare
from dpo_fast.training.recorded import RUN_CONFIG, read_recorded
from dpo_fast.training.resume import restore

# Options that change the steps of a run, or where they find what they need.
OF_REPLAY = (
    *("model", "data", "loss", "reference", "parallel", "train.output_dir", "train.seed"),
    *("train.global_batch_size", "train.micro_batch_size", "train.tokens_per_batch"),
    *("train.num_train_epochs", "train.max_steps", "train.learning_rate", "train.warmup_ratio"),
    "train.warmup_steps",
    *("train.lr_scheduler_type", "train.lr_scheduler_kwargs", "train.weight_decay"),
    *("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.max_grad_norm"),
    *("train.layout", "train.implementation", "train.workspace_bytes", "train.nonfinite"),
    *("train.max_nonfinite_steps", "train.skip_rows", "train.change_on_resume"),
)


@dataclass(frozen=True)
class Asked:
    """A step of a run, counted from 1, and the checkpoint that it is reached from; None: the start."""

    run: Path
    step: int
    checkpoint: Path | None

    @property
    def world_size(self) -> int:
        """Ranks of the checkpoint, and so of the run. Of a run without one it is not known."""
        if self.checkpoint is None:
            return 1
        return json.loads((self.checkpoint / "state.json").read_text())["world_size"]


def find_step(place: Path, step: int | None) -> Asked:
    """Where to begin. place: the folder of a run or of a checkpoint; step: default, that which ended it.

    Raises:
        UserError: there is no run, no such step, or nothing that says which step.
    """
    named = (place / "state.json").is_file()
    place = place.resolve() if named else place  # `.` has no name, and no folder above it
    run = place.parent if named else place
    if not (run / RUN_CONFIG).is_file():
        raise UserError(f"{place} is no run: name its train.output_dir, which holds {RUN_CONFIG}")
    if step is None:
        told = [file.stem.removeprefix(NONFINITE) for file in run.glob(f"{NONFINITE}*.json")]
        step = max((int(each) for each in told if each.isdecimal()), default=None)
    if step is None:
        raise UserError(
            f"{run} has no {NONFINITE}N.json, which a run leaves that ended with numbers that are not "
            "finite; name a step"
        )
    found = [place] if named else checkpoints(run)
    before = [each for each in found if _step(each) < step]
    if named and not before:
        raise UserError(f"{place} was written after step {step} began; name an earlier checkpoint")
    return Asked(run, step, before[-1] if before else None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def replay(asked: Asked, overrides: list[str] | tuple[str, ...] = ()) -> list[Row]:
    """Take the steps up to it, then look at its rows. Returns those of all ranks. Collective."""
    tree = read_recorded(asked.run / RUN_CONFIG)
    parallel = tree.get("parallel")
    tree["parallel"] = data_ranks.shared_or_whole(parallel, distributed.world_size())
    for override in overrides:
        apply(tree, override)
    config = build_config(tree, str(asked.run / RUN_CONFIG))
    check_used(overrides, OF_REPLAY, "a replay")
    choices = check_run(config)
    data_ranks.join(config.parallel)
    run = prepare(config, choices)
    sums, step = MetricSums(run.engine.device), 0
    if asked.checkpoint is not None:
        step = restore(run, asked.checkpoint, sums)["step"]
        say(f"from {asked.checkpoint}, after step {step}")
    if asked.step > run.total_steps:
        raise UserError(f"the run has {run.total_steps} steps, and step {asked.step} is asked for")
    before = range(step, asked.step - 1)
    for each in track(before, "steps before it", len(before)):
        update(run, each, sums)
        run.guard.look(ahead=0)
    place = Place(asked.step - 1, *run.train.at(asked.step - 1))
    rows = examine(run, place)
    say(f"step {asked.step}: {findings(place, rows)}")
    told = write_rows(run, place, rows, REPLAYED)
    say(f"{told} has all rows")
    culprit = next((row for row in rows if row.fault), None)
    alone = distributed.world_size() == 1 and not run.loss_pass.objective.coupled
    if culprit is not None and alone:
        say(f"anomaly detection for {culprit.where}: {where_nan(run, place, culprit)}")
    return rows
