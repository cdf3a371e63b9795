"""What an earlier run left in the output folder: nothing of it is lost unless that is asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.training.best import FILE as BEST
from dpo_fast.training.checkpoints import LATEST, checkpoints
from dpo_fast.training.config import RunConfig
from dpo_fast.training.eval_examples import EVAL_EXAMPLES

METRICS, EARLIER_METRICS = "metrics.jsonl", "metrics-earlier.jsonl"
MODEL = "final"


def check_earlier_run(config: RunConfig) -> None:
    """Raises UserError if a new run would overwrite an earlier one without having been asked to."""
    train, root = config.train, Path(config.train.output_dir)
    if train.overwrite_output_dir or train.resume_from_checkpoint:
        return
    found = checkpoints(root)
    if found:
        raise UserError(
            f"train.output_dir={train.output_dir} holds {found[-1].name} of an earlier run: set "
            "train.resume_from_checkpoint=true to go on from its latest checkpoint, "
            "train.overwrite_output_dir=true to begin again and remove its checkpoints, or name another "
            "folder"
        )
    if (root / MODEL).exists():
        raise UserError(
            f"train.output_dir={train.output_dir} holds {MODEL}, the model of an earlier run: set "
            "train.overwrite_output_dir=true to replace it, or name another folder"
        )


def make_room(root: Path) -> None:
    """Before a new run: remove checkpoints, which a resumption would take for its own, set metrics aside.

    Only what `check_earlier_run` allowed is there. Raises OSError.
    """
    for name in (LATEST, BEST, EVAL_EXAMPLES):
        (root / name).unlink(missing_ok=True)
    for folder in checkpoints(root):
        shutil.rmtree(folder)
    if (root / METRICS).is_file():
        os.replace(root / METRICS, root / EARLIER_METRICS)
