"""A base model and an adapter made into one model folder."""

from __future__ import annotations

from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import base_of
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import auto_class, load_model_config, local_folder, resize_for_adapter
from dpo_fast.models.save import copy_input_files, write_model


def write_merged(section: ModelSection, adapter: Path, target: Path) -> None:
    """Merge an adapter into the base model of a section, in the dtype of the section, on the CPU.

    Other files are the base's, and the adapter's tokenizer where it has one.

    Raises:
        UserError: the adapter does not fit, or is of a kind that cannot be merged.
    """
    from peft import PeftModel

    base = base_of(section.path)
    model = auto_class(load_model_config(section)).from_pretrained(
        base, dtype=section.torch_dtype, trust_remote_code=section.trust_remote_code
    )
    resize_for_adapter(model, str(adapter))
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (AttributeError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter {adapter} cannot be merged into {base}: {error}") from error
    write_model(merged, merged.state_dict(keep_vars=True), local_folder(base), target)
    copy_input_files(adapter, target)
