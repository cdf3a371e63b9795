"""A base model and an adapter made into one model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import (
    adapter_file,
    adapter_vocabulary,
    adapters_under,
    base_of,
    of_image_text_model,
)
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
from dpo_fast.models.save import copy_input_files, tensor_names, write_model

# What train.merge_dtype may say, as transformers takes it.
MERGED = {"auto": "auto", "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write_merged(section: ModelSection, adapter: Path, target: Path, dtype: str = "auto") -> str:
    """Merge an adapter into the base model of a section, on the CPU. Returns the dtype of the result.

    Other files are the base's, and the adapter's tokenizer where it has one. Weights are rounded
    once. A base that is quantised is what was trained on: its weights are those that it computes with, no
    longer quantised.

    dtype: a name of `MERGED`; auto: that of the base checkpoint, in which what the adapter does not change
        stays as it is, whatever its dtype. A base in fp32 that is rounded to bf16 may move logits by more
        than the adapter does.

    Raises:
        UserError: the adapter does not fit, is of a kind that cannot be merged, or fp16 holds too little.
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
        adapted = PeftModel.from_pretrained(model, adapter)
        names = {"default": str(adapter)} | adapters_under(str(adapter))
        for name, folder in list(names.items())[1:]:
            adapted.load_adapter(folder, name)
        check_merges(adapted, f"the adapter {adapter} cannot be merged into {base}")
        changed = set().union(*(_changed_by(adapted, Path(each)) for each in names.values()))
        merged = adapted.merge_and_unload(adapter_names=_in_turn(adapted, list(names)))
    except (AttributeError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter {adapter} cannot be merged into {base}: {error}") from error
    state = merged.state_dict(keep_vars=True)
    if dtype == "fp16":
        _check_held(state)
    as_it_was = dtype == "auto" and section.quantization is None
    untouched = _untouched(state, changed) if as_it_was else set()
    write_model(merged, state, local_folder(base), target, untouched)
    copy_input_files(adapter, target)
    return str(found).removeprefix("torch.")


def _check_held(state: Mapping[str, Tensor]) -> None:
    """Raises UserError for a weight that the narrow range of fp16 makes infinite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"the merged model cannot be written in dtype fp16: {name} is beyond 65504, the largest "
                "number of fp16; write it in bf16 or fp32 (train.merge_dtype, or --dtype)"
            )


def check_merges(adapted: nn.Module, what: str) -> None:
    """Check that no layer with an adapter shares its weight with another layer, as Zamba's blocks do.

    Each such layer has an adapter of its own, and the weight that they share can hold one sum alone.
    Embeddings and a head that shares their weight are written apart.

    what: what cannot be done, for the message.

    Raises:
        UserError: naming such layers and the remedy.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = adapted.get_base_model()
    owners: dict[int, list[str]] = {}
    with_adapters = set()
    for name, module in base.named_modules():
        if name.endswith(".base_layer"):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(inner, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        owners.setdefault(id(weight), []).append(name)
        if isinstance(module, BaseTunerLayer):
            with_adapters.add(id(weight))
    ends = {id(base.get_input_embeddings().weight)}
    shared = [owners[key] for key in with_adapters - ends if len(owners[key]) > 1]
    if shared:
        names = min(shared)
        raise UserError(
            f"{what}: {', '.join(names)} have one weight, and adapters of their own ({len(shared)} such "
            f"weights in {type(base).__name__}). Keep the adapter as it is (train.merge_lora=false), or "
            "train without adapters there (model.lora.exclude_modules)"
        )


def _in_turn(model: nn.Module, names: list[str]) -> list[str]:
    """Adapters in the order in which they can be merged: DoRA scales the base as it came."""
    scaling = [name for name in names if getattr(model.peft_config[name], "use_dora", False)]
    if len(scaling) > 1:
        raise ValueError(
            f"{' and '.join(scaling)} are both DoRA, and each scales the base as it came"
        )
    return sorted(names, key=lambda name: name not in scaling)


def _changed_by(model: nn.Module, adapter: Path) -> set[str]:
    """Names of the modules and parameters of a base model that its adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base, kinds = model.get_base_model(), (BaseTunerLayer, AuxiliaryTrainingWrapper)
    # Biases and embeddings may lie in the file as they are, and both ends are resized together.
    names = tensor_names(adapter_file(str(adapter)))
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    resized = ends if adapter_vocabulary(str(adapter)) is not None else ()
    return {name.removeprefix("base_model.model.") for name in names} | {
        name
        for name, module in base.named_modules()
        if isinstance(module, kinds) or any(module is end for end in resized)
    }


def _untouched(state: Mapping[str, Tensor], changed: set[str]) -> set[str]:
    """Names of the tensors that are those of the base; what is tied is changed together."""
    parts = {key: key.split(".") for key in state}
    hit = {
        key
        for key, names in parts.items()
        if any(".".join(names[:end]) in changed for end in range(1, len(names) + 1))
    }
    places = {state[key].data_ptr() for key in hit}
    return {key for key, tensor in state.items() if tensor.data_ptr() not in places} - hit


@torch.no_grad()
def _take_quantised(model: nn.Module, section: ModelSection, base: str, whole: bool) -> None:
    """Give a model the weights that its layers have where it is quantised as the section says."""
    from peft.utils.integrations import dequantize_module_weight

    quantised = auto_class(load_model_config(section), whole).from_pretrained(
        **source(base),
        dtype=section.torch_dtype,
        trust_remote_code=section.trust_remote_code,
        **loading_options(section, model),
    )
    for name, module in quantised.named_modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            weight = model.get_submodule(name).weight
            weight.data = dequantize_module_weight(module).to(weight)
