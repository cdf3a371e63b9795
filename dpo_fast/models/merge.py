"""A base model and an adapter made into one model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import base_of, of_image_text_model
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import source
from dpo_fast.models.load import (
    auto_class,
    load_model_config,
    local_folder,
    resize_for_adapter,
    takes_whole,
)
from dpo_fast.models.quantization import loading_options
from dpo_fast.models.save import copy_input_files, write_model

# What train.merge_dtype may say, as transformers takes it.
MERGED = {"auto": "auto", "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write_merged(section: ModelSection, adapter: Path, target: Path, dtype: str = "auto") -> str:
    """Merge an adapter into the base model of a section, on the CPU. Returns the dtype of the result.

    Other files are the base's, and the adapter's tokenizer where it has one. Weights are rounded
    once. A base that is quantised is what was trained on: its weights are those that it computes with, no
    longer quantised.

    dtype: a name of `MERGED`; auto: that of the base checkpoint. A base in fp32 that is rounded to bf16 may
        move logits by more than the adapter does.

    Raises:
        UserError: the adapter does not fit, or is of a kind that cannot be merged.
    """
    from peft import PeftModel

    base = base_of(section.path)
    whole = takes_whole(section) or of_image_text_model(str(adapter))
    model = auto_class(load_model_config(section), whole).from_pretrained(
        **source(base), dtype=MERGED[dtype], trust_remote_code=section.trust_remote_code
    )
    found = model.dtype
    if section.quantization is not None:
        _take_quantised(model, section, base, whole)
    resize_for_adapter(model, str(adapter))
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (AttributeError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter {adapter} cannot be merged into {base}: {error}") from error
    write_model(merged, merged.state_dict(keep_vars=True), local_folder(base), target)
    copy_input_files(adapter, target)
    return str(found).removeprefix("torch.")


@torch.no_grad()
def _take_quantised(model: nn.Module, section: ModelSection, base: str, whole: bool) -> None:
    """Give a model the weights that its layers have where it is quantised as the section says."""
    from peft.utils.integrations import dequantize_module_weight

    quantised = auto_class(load_model_config(section), whole).from_pretrained(
        **source(base),
        dtype=section.torch_dtype,
        trust_remote_code=section.trust_remote_code,
        **loading_options(section),
    )
    for name, module in quantised.named_modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            weight = model.get_submodule(name).weight
            weight.data = dequantize_module_weight(module).to(weight)
