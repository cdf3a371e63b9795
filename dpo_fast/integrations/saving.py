"""`save_model` of the trainers: all of the checkpoint that a model was loaded from.

The class that scores texts may be a part of what a checkpoint holds: `AutoModelForCausalLM` leaves out the
vision tower of a Qwen3.5, and heads for further tokens. What `Trainer` would write has lost them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import weight_files
from dpo_fast.models.load import local_folder
from dpo_fast.models.save import HEAVY, tensor_names, write_model

# Keys of a configuration that say how it was written.
WRITTEN = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


class WholeFolders:
    """Goes before `transformers.Trainer`, or one made of it.

    Folders that it resumes from (`checkpoint-N`) stay its own: it reads them by the names of the class.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Of a model that transformers cut while it loaded, save_pretrained gathers each tensor itself.
        apart = getattr(model, "_device_mesh", None) or getattr(model, "hf_quantizer", None)
        plain = isinstance(model, PreTrainedModel) and not apart
        whole = plain and not folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if whole and state_dict is None:
            state_dict = model.state_dict()
        super()._save(str(folder), state_dict)
        # DeepSpeed without stage3_gather_16bit_weights_on_model_save has none to give.
        if whole and state_dict and self.args.should_save:
            complete(folder, model, state_dict)


def complete(folder: Path, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Add to a saved model what its own checkpoint has and it has not, under the checkpoint's names.

    It is as it was saved, with a warning, where that checkpoint is not found or has another architecture.

    state: the tensors of the model, whole, by their names in it.
    """
    if not model.name_or_path:
        return
    try:
        source = local_folder(model.name_or_path)
        files = weight_files(source)
    except (UserError, OSError, ValueError):
        return  # not from a checkpoint, or it is gone
    if source.resolve() == folder.resolve():
        return
    saved = {name for file in weight_files(folder) for name in tensor_names(file)}
    lacking = {name for file in files for name in tensor_names(file)} - saved
    if not lacking:
        return
    lost = f"{folder} has not {len(lacking)} tensors of {source}, such as {min(lacking)}"
    fresh = _config_of(model, source)
    if fresh is None or not _is_as_loaded(model, fresh):
        warnings.warn(f"{lost}: the model was changed after it was loaded", stacklevel=2)
        return
    aside = durable.aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write_model(model, state, source, aside)
    except UserError as error:
        shutil.rmtree(aside, ignore_errors=True)
        warnings.warn(f"{lost}: {error}", stacklevel=2)
        return
    _note_changes(aside / "config.json", model.config, fresh)
    for file in folder.iterdir():
        if file.name.endswith(HEAVY) and file.name.startswith(("model", "pytorch_model")):
            file.unlink()
    for file in sorted(each for each in aside.rglob("*") if each.is_file()):
        place = folder / file.relative_to(aside)
        # The tokenizer and the generation config are those of the trainer.
        if file.name == "config.json" or file.name.endswith(HEAVY) or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    shutil.rmtree(aside)


def _config_of(model: PreTrainedModel, source: Path) -> PretrainedConfig | None:
    """The configuration of a folder, of its text part if that is the model; None if it is of neither."""
    trust = hasattr(model.config, "auto_map")
    whole = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    kind = type(model.config)
    return next((each for each in (whole, whole.get_text_config()) if type(each) is kind), None)


def _is_as_loaded(model: PreTrainedModel, fresh: PretrainedConfig) -> bool:
    """Whether a model has the tensors that one loaded now would have, rows of embeddings aside."""
    with torch.device("meta"):
        other = type(model)._from_config(fresh)
    return other.state_dict().keys() == model.state_dict(keep_vars=True).keys()


def _note_changes(file: Path, config: PretrainedConfig, fresh: PretrainedConfig) -> None:
    """What was changed in a model's configuration, such as by `Trainer` for the tokens of a tokenizer."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    part = tree if tree.get("model_type") == config.model_type else tree.get("text_config", tree)
    before, now = fresh.to_dict(), config.to_dict()
    part |= {
        name: value
        for name, value in now.items()
        if name not in WRITTEN and not isinstance(value, dict) and before.get(name) != value
    }
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
