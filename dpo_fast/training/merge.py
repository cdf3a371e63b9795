"""`model.adapter=merge`: a run starts from the adapter merged into its base, a folder of its own."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from dpo_fast import durable
from dpo_fast.models.checkpoint import is_adapter
from dpo_fast.models.merge import write_merged
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.weights import identity_on_this_rank

FOLDER = "merged_base"
ORIGIN = "merged_from.json"


def merged_first(config: RunConfig) -> RunConfig:
    """The configuration with the merged model for `model.path`, which is written if it is not there.

    Collective. New adapters that are trained on it name that folder as their base.
    """
    if config.model.adapter != "merge" or not is_adapter(config.model.path):
        return config
    folder = distributed.from_main(partial(_merged, config))
    model = config.model.model_copy(update={"path": folder, "adapter": None})
    return config.model_copy(update={"model": model})


def _merged(config: RunConfig) -> str:
    folder = Path(config.train.output_dir) / FOLDER
    origin = {
        "identity": identity_on_this_rank(config, config.model.path),
        "dtype": config.model.precision,
    }
    if _is_of(folder, origin):  # in a folder that is read-only, too
        return str(folder)
    with saving(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # `reference` and `train` of one configuration may both begin here.
        with durable.in_turn(folder.with_name(f".{FOLDER}.lock")):
            if not _is_of(folder, origin):
                _write(config, folder, origin)
    return str(folder)


def _is_of(folder: Path, origin: dict) -> bool:
    """Whether the folder is there, whole, and of this adapter on this base."""
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8")) == origin
    except (OSError, ValueError):
        return False  # or of a run that was killed


def _write(config: RunConfig, folder: Path, origin: dict) -> None:
    path, aside = config.model.path, durable.aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    with saving(aside):
        # What is quantised is the merged model, when it is loaded.
        plain = config.model.model_copy(update={"quantization": None})
        write_merged(plain, Path(path), aside, config.model.precision)
        (aside / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        durable.publish(aside, folder, replace=True)
    say(f"merged the adapter {path} into its base: {folder}")
