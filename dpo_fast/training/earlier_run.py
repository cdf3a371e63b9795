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
MODEL, GENERATIONS = "final", "generations.jsonl"
NONFINITE, REPLAYED = "nonfinite-step-", "replay-step-"
# What reports, evaluations, replays and pushes would take for the new run's.
OF_ONE_RUN = (LATEST, BEST, EVAL_EXAMPLES, GENERATIONS, f"{NONFINITE}*.json", f"{REPLAYED}*.json")


def check_earlier_run(config: RunConfig) -> None:
    """Raises UserError if a new run would overwrite an earlier one unasked, or what it needs itself."""
    train, root = config.train, Path(config.train.output_dir)
    if train.overwrite_output_dir:
        _check_needed(config, root)
    if train.overwrite_output_dir or train.resume_from_checkpoint:
        return
    found = checkpoints(root)
    if found:
        raise UserError(
            f"train.output_dir={train.output_dir} holds {found[-1].name} of an earlier run: set "
            "train.resume_from_checkpoint=true to go on from its latest checkpoint, "
            "train.overwrite_output_dir=true to begin again and remove its checkpoints and model, or name "
            "another folder"
        )
    if (root / MODEL).exists():
        raise UserError(
            f"train.output_dir={train.output_dir} holds {MODEL}, the model of an earlier run: set "
            "train.overwrite_output_dir=true to replace it, or name another folder"
        )


def _check_needed(config: RunConfig, root: Path) -> None:
    """Raises UserError for a model, an optimiser's state or answers that `make_room` would remove."""
    given = config.model.model_dump()  # where adapters are joined, `path` is a folder of the cache
    needed = {
        **{f"model.{name}": given[name] for name in ("path", "adapter_path", "tokenizer")},
        **{f"model.adapters.{name}": path for name, path in (given["adapters"] or {}).items()},
        "reference.path": config.reference.path,
        "reference.old_path": config.reference.old_path,
        "train.optimizer_from": config.train.optimizer_from,
        "generate.first_answers": config.generate.first_answers,
    }
    removed = [path.resolve() for path in _of_earlier_run(root)]
    for option, path in needed.items():
        place = Path(os.path.expanduser(path)).resolve() if path else None
        if place and any(place.is_relative_to(each) for each in removed):
            raise UserError(
                f"{option}={path} is of the run that train.overwrite_output_dir=true removes; name another "
                "train.output_dir"
            )


def _of_earlier_run(root: Path) -> list[Path]:
    """Files and folders of an earlier run that are removed before a new one."""
    files = [file for pattern in OF_ONE_RUN for file in root.glob(pattern)]
    return [*files, *checkpoints(root), *root.glob(MODEL)]


def make_room(root: Path) -> None:
    """Before a new run: remove what would be taken for its own, and set the metrics aside.

    Only what `check_earlier_run` allowed is there. Raises OSError.
    """
    for path in _of_earlier_run(root):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if (root / METRICS).is_file():
        os.replace(root / METRICS, root / EARLIER_METRICS)
