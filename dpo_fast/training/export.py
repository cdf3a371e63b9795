"""The trained model as a plain Hugging Face folder, or as a LoRA adapter."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dpo_fast import durable
from dpo_fast.data.template_file import with_template
from dpo_fast.models import ScoringModel
from dpo_fast.models.adapters import ADAPTER
from dpo_fast.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTERS,
    adapter_file,
    adapter_vocabulary,
    adapters_under,
    base_of,
)
from dpo_fast.models.load import local_folder, tokenizer_path, transformers_tokenizer
from dpo_fast.models.lora_start import TAKEN, is_taken, plain_adapter
from dpo_fast.models.merge import write_merged
from dpo_fast.models.save import copy_input_files, remove_input_files, write_model
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.model_card import write_card

MERGED = "merged"  # the folder of the merged model beside its adapter


def export(
    model: ScoringModel, config: RunConfig, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write what `from_pretrained` loads: the model, or its adapter. Collective.

    With `train.merge_lora` also the merged model, to `merged/`.

    state: the trained tensors on rank 0, if they are not those that the model has now.

    Raises:
        UserError: it cannot be written; an older export stays whole.
    """
    state = gather_trained(model.model) if state is None else state
    if distributed.is_main():
        aside = durable.aside(folder)
        shutil.rmtree(aside, ignore_errors=True)
        with saving(aside):
            write_export(model, state, config, aside)
            durable.publish(aside, folder, replace=True)
    distributed.barrier()


def write_export(
    model: ScoringModel,
    state: dict[str, Tensor],
    config: RunConfig,
    folder: Path,
    step: int | None = None,
) -> None:
    """Write the files of an export into a folder, on one rank.

    model: gives names and shapes; its weights are not read.
    state: the trained tensors, whole, by their names in the model.
    step: whose model it is, for the card; None: the last that the run has logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.has_adapter:
        _save_adapter(model, state, config, folder)
    else:
        write_model(model.causal_lm, state, local_folder(config.model.path), folder)
        write_tokenizer(config, folder)
    if config.train.merge_lora:
        dtype = write_merged(config.model, folder, folder / MERGED, config.train.merge_dtype)
        say(f"merged in {dtype} (train.merge_dtype={config.train.merge_dtype})")
        write_tokenizer(config, folder / MERGED)
        write_card(config, folder / MERGED, step)
    write_card(config, folder, step, adapter=model.has_adapter)


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained tensors, whole, on the CPU of rank 0; {} on other ranks. Collective, one after the other.

    A Parameter with two names (tied embeddings) becomes one tensor with two names. With them what belongs
    to trained adapters (`lora_start.TAKEN`).
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not (value.requires_grad or is_taken(name)):
            continue
        if id(value) not in copies:
            copies[id(value)] = _whole(value)
        state[name] = copies[id(value)]
    return state if distributed.is_main() else {}


def _whole(value: Tensor) -> Tensor:
    if not hasattr(value, "ds_id"):
        return value.detach().cpu().clone() if distributed.is_main() else value.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        return value.detach().cpu().clone() if distributed.is_main() else torch.empty(0)


def write_tokenizer(config: RunConfig, folder: Path) -> None:
    """Put model.tokenizer and data.chat_template into a folder that has the model's own files."""
    section = config.model
    if section.tokenizer is None and config.data.chat_template is None:
        return
    # As it is on disk: a run gives its own a padding token where there is none.
    tokenizer = transformers_tokenizer(tokenizer_path(section), section.trust_remote_code)
    tokenizer = with_template(tokenizer, config.data)
    remove_input_files(folder)
    tokenizer.save_pretrained(folder)


def untrained_embeddings(path: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings and head that an adapter comes with and that are not trained: they belong to it."""
    if adapter_vocabulary(path) is None:
        return {}
    found = {}
    with safe_open(adapter_file(path), "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            trained = f"{name.removesuffix('weight')}modules_to_save."
            inside = "lora_" in name or "modules_to_save" in name or "original_module" in name
            if not inside and not any(key.startswith(trained) for key in state):
                found[name] = tensors.get_tensor(name)
    return found


def save_adapter(
    model: ScoringModel, state: dict[str, Tensor], folder: Path, base: str | None = None
) -> None:
    """Write the trained adapter as peft does: on the base as it came. state: as of `write_export`.

    base: the folder that the adapter names as its base; None: the one that the model was loaded from.
    """
    configs, own = model.model.peft_config, model.model.peft_config[ADAPTER]
    if TAKEN in configs:
        state, configs[ADAPTER] = plain_adapter(state, own)
    if base is not None and os.path.isdir(base):
        configs[ADAPTER] = copy.copy(configs[ADAPTER])
        configs[ADAPTER].base_model_name_or_path = base
    try:
        model.model.save_pretrained(folder, state_dict=state, selected_adapters=[ADAPTER])
    finally:
        configs[ADAPTER] = own


def _save_adapter(
    model: ScoringModel, state: dict[str, Tensor], config: RunConfig, folder: Path
) -> None:
    state = untrained_embeddings(config.model.path, state) | state
    save_adapter(model, state, folder, config.model.told_base)
    _copy_adapters(adapters_under(config.model.path), folder)
    for path in dict.fromkeys((base_of(config.model.path), config.model.path)):
        copy_input_files(local_folder(path), folder)
    write_tokenizer(config, folder)


def _copy_adapters(adapters: Mapping[str, str], folder: Path) -> None:
    """Put the adapters under the trained one into folders of their names, as peft does, and list them."""
    for name, source in adapters.items():
        (folder / name).mkdir()
        for file in (adapter_file(source), Path(source) / ADAPTER_CONFIG):
            shutil.copyfile(file, folder / name / file.name)
    if adapters:
        content = json.dumps({"adapters": {name: name for name in adapters}}, indent=2)
        (folder / ADAPTERS).write_text(content, encoding="utf-8")
