"""Whether what a configuration names is there: models, tokenizer, data, a folder to write to.

It is told at once, before transformers and PyTorch are imported.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dpo_fast import durable
from dpo_fast.data.parts import parts_of
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import check_model_path, is_folder
from dpo_fast.training.config import RunConfig


def check_places(config: RunConfig) -> None:
    """Look for the models and the data of a run. Hub ids are looked up later.

    Raises:
        UserError: naming the option, its value and what was expected there.
    """
    check_model_path(config.model.path)
    if config.model.tokenizer is not None:
        is_folder(config.model.tokenizer, "model.tokenizer")
    for path, option in (
        (config.reference.path, "reference.path"),
        (config.reference.old_path, "reference.old_path"),
    ):
        if path is not None:
            check_model_path(path, option)
    parts_of(config.data, "train")  # those of data.eval are looked for as well


def check_writable(output_dir: str, option: str = "train.output_dir") -> None:
    """Raises UserError unless the run can be written there. Makes no folder: the data may be bad.

    option: that names the folder, for errors.
    """
    for each in (Path(output_dir), *Path(output_dir).parents):
        if each.is_symlink() and not each.exists():
            raise UserError(
                f"{option}={output_dir} cannot be written: {each} is a link to "
                f"{os.readlink(each)}, which is not there; make that folder, or name another"
            )
    try:
        with tempfile.TemporaryFile(dir=durable.existing(Path(output_dir))):
            pass
    except OSError as error:
        raise UserError(
            f"{option}={output_dir} cannot be written: {error.strerror or error}; name another "
            "folder"
        ) from None
