"""A checkpoint by itself: which folder it is, the configuration of its run, and the model out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import check_model_path
from dpo_fast.models.hub import commit_of
from dpo_fast.models.merge import write_merged
from dpo_fast.models.quantization import check_quantization
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.training import distributed
from dpo_fast.training.checkpoint_weights import read_trained
from dpo_fast.training.checkpoints import (
    PREFIX,
    check_whole,
    find_checkpoint,
    is_checkpoint,
    read_state,
    still_there,
)
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.config_file import apply
from dpo_fast.training.export import MERGED, gather_trained, write_export
from dpo_fast.training.overrides import check_used
from dpo_fast.training.recorded import CONFIG, RUN_CONFIG, read_recorded, written
from dpo_fast.training.weights import identity_on_this_rank, path_as_it_began

OF_EXPORT = (
    *("model.path", "model.adapter_path", "model.adapters", "model.tokenizer"),
    *("model.dtype", "model.trust_remote_code"),
    *("data.chat_template", "data.cache_dir", "train.merge_lora", "train.merge_dtype"),
)
OF_MERGE = ("model.dtype", "model.trust_remote_code", "model.quantization")
WEIGHTS = "the hash of model.path's weights"  # in state.json


def write_beside(config: RunConfig, model, folder: Path) -> None:
    """Write what makes a checkpoint a folder of its own. Collective.

    That is the run's configuration, and with `train.save_model` the model as `from_pretrained` loads it.
    """
    state = gather_trained(model.model) if config.train.save_model else {}
    if distributed.is_main():
        (folder / CONFIG).write_text(written(config), encoding="utf-8")
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
    """The configuration of a checkpoint's run, with options of its export changed. Raises UserError."""
    tree = read_recorded(checkpoint / CONFIG)
    for override in overrides:
        apply(tree, override)
    config = build_config(tree, str(checkpoint))  # a key that does not exist is told first
    check_used(overrides, OF_EXPORT, "an export")
    return config


def export_checkpoint(
    checkpoint: Path, out: Path, overrides: Sequence[str] = (), merged: bool = False
) -> None:
    """Write the model of a checkpoint to `out`, as the run itself would have exported it then.

    merged: only the model with its adapter merged, which `train.merge_lora` asks for.

    Raises:
        UserError: `out` is there, the checkpoint is damaged, or the model it began with is another one.
    """
    check_target(checkpoint, out)
    with still_there(checkpoint):
        check_whole(checkpoint)
        run = config_of(checkpoint, overrides)
        state = read_state(checkpoint)
        # The identity of a quantised model does not tell a folder from a hub id.
        check_base(run.model.path, None if run.model.quantization else state.get(WEIGHTS))
        check_start(checkpoint, run, state)
        model = scoring_skeleton(run.model)
        tensors = read_trained(checkpoint, model.model)
    if any(override.startswith("model.dtype=") for override in overrides):
        tensors = {name: tensor.to(run.model.torch_dtype) for name, tensor in tensors.items()}
    aside = durable.aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    with durable.writing(aside, "The checkpoint is as it was: make room, or name another folder"):
        aside.mkdir(parents=True)
        write_export(model, tensors, run, aside, state.get("step"))
        durable.publish(aside / MERGED if merged else aside, out, replace=out.exists())
        shutil.rmtree(aside, ignore_errors=True)


def merge_adapter(
    adapter: Path, out: Path, dtype: str = "auto", overrides: Sequence[str] = ()
) -> None:
    """Write an adapter's folder merged into its base, which is quantised as in the adapter's run.

    overrides: of `model`: dtype, trust_remote_code and quantization.

    Raises:
        UserError: `out` is there, the base is not, or the adapter does not fit it.
    """
    check_target(adapter, out)
    beside, tree = adapter.absolute().parent / RUN_CONFIG, {"model": {"path": str(adapter)}}
    if beside.is_file():
        known = read_recorded(beside).get("model", {})
        tree["model"] |= {name: known[name] for name in ("quantization", "dtype") if name in known}
    for override in overrides:
        if not override.startswith(OF_MERGE):
            raise UserError(f"{override} changes nothing here; options are {', '.join(OF_MERGE)}")
        apply(tree, override)
    needed = {"data": {"train": "none"}, "train": {"output_dir": str(out)}}
    section = build_config(tree | needed, str(adapter)).model
    check_model_path(section.path)
    check_quantization(section, distributed.device())
    aside = durable.aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    with durable.writing(aside, "The adapter is as it was: make room, or name another folder"):
        write_merged(section, adapter, aside, dtype)
        durable.publish(aside, out, replace=out.exists())


def before_export(config: RunConfig, weights: Mapping[str, str], step: int) -> RunConfig:
    """The configuration for the export at a run's end, after its last checkpoint. Collective.

    What was not trained comes from model.path, so it has to hold what it held at the start.

    weights: the identities of the run's models, by the options that name them.

    Raises:
        UserError: it does not, and the last checkpoint has all that was trained.
    """
    known = weights["model.path"]
    try:
        path = distributed.from_main(lambda: path_as_it_began(config, known))
    except UserError as error:
        folder = Path(config.train.output_dir) / f"{PREFIX}{step}"
        raise UserError(
            f"{error}, and what was not trained is taken from there. Nothing is lost: {folder} has what "
            f"the run trained. With the weights of the start in a folder, dpo-fast export {folder} "
            "model.path=FOLDER writes the model"
        ) from None
    model = config.model.model_copy(update={"path": path})
    return config.model_copy(update={"model": model})


def check_target(checkpoint: Path, out: Path) -> None:
    """Raises UserError unless a folder can get the name `out`, with the checkpoint as it was."""
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(
            f"{out} lies in {checkpoint}, which is resumed only if it holds what the run wrote: name a "
            "folder beside it"
        )
    if out.resolve() == Path.cwd():
        raise UserError(f"{out} is the folder that you are in, and a new one is made: name that")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder, or remove it")


def check_base(path: str, known: str | None = None) -> None:
    """Raises UserError unless the model that a run began with is where it was.

    known: the identity that it had. That of a folder is a hash, and the hub is not asked for a folder.
    """
    try:
        check_model_path(path)
        if known is not None and len(known) == 64 and not Path(path).expanduser().is_dir():
            raise UserError("it was a folder, and there is none of that name here")
        if not Path(path).exists():
            commit_of(path)
    except (UserError, OSError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else durable.first_line(error)
        raise UserError(
            f"the run began with model.path={path}, which cannot be found: {reason.rstrip('.')}. If it "
            "lies elsewhere now, name that folder behind the command, model.path=FOLDER"
        ) from None


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
