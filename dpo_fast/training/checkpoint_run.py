"""A checkpoint by itself: which folder it is, the configuration of its run, and the model out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.training import distributed
from dpo_fast.training.checkpoint_weights import read_trained
from dpo_fast.training.checkpoints import check_whole, find_checkpoint, is_checkpoint, read_state
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.config_file import read_tree
from dpo_fast.training.export import gather_trained, write_export
from dpo_fast.training.weights import identity_on_this_rank

CONFIG, RUN_CONFIG = "dpo_fast.yaml", "config.yaml"  # in a checkpoint; in the folder of a run
WEIGHTS = "the hash of model.path's weights"  # in state.json


def write_beside(config: RunConfig, model, folder: Path) -> None:
    """Write what makes a checkpoint a folder of its own. Collective.

    That is the run's configuration, and with `train.save_model` the model as `from_pretrained` loads it.
    """
    state = gather_trained(model.model) if config.train.save_model else {}
    if distributed.is_main():
        resolved = yaml.safe_dump(config.resolved(), sort_keys=False)
        (folder / CONFIG).write_text(resolved, encoding="utf-8")
        if config.train.save_model:
            write_export(model, state, config, folder)


def checkpoint_of(path: str) -> Path | None:
    """The checkpoint that a path means: itself, or the newest of a run's folder. None if it is neither."""
    folder = Path(os.path.expanduser(path))
    if is_checkpoint(folder):
        return folder
    if (folder / RUN_CONFIG).is_file():
        return find_checkpoint(True, str(folder))
    return None


def config_of(checkpoint: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a checkpoint's run, with some options changed. Raises UserError."""
    return build_config(read_tree(str(checkpoint / CONFIG), overrides), str(checkpoint))


def export_checkpoint(checkpoint: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Write the model of a checkpoint to `out`, as the run itself would have exported it then.

    Raises:
        UserError: `out` is there, the checkpoint is damaged, or the model it began with is another one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder, or remove it")
    check_whole(checkpoint)
    run = config_of(checkpoint, overrides)
    state = read_state(checkpoint)
    check_start(checkpoint, run, state)
    model = scoring_skeleton(run.model)
    tensors = read_trained(checkpoint, model.model)
    aside = durable.aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    with durable.writing(aside, "The checkpoint is as it was: make room, or name another folder"):
        aside.mkdir(parents=True)
        write_export(model, tensors, run, aside)
        durable.publish(aside, out, replace=out.exists())


def check_start(checkpoint: Path, config: RunConfig, state: dict) -> None:
    """Raises UserError unless model.path still holds the weights that the run began with.

    What was not trained comes from there.
    """
    known = state.get(WEIGHTS)
    if known is not None and identity_on_this_rank(config, config.model.path) != known:
        raise UserError(
            f"model.path={config.model.path} holds other weights than those that {checkpoint} began with, "
            "and what was not trained is taken from there: name their folder behind the command, "
            "model.path=FOLDER"
        )
