"""A plain Hugging Face folder: safetensors, configuration, tokenizer; or a LoRA adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_fast import durable
from dpo_fast.models import ScoringModel
from dpo_fast.models.config import ModelSection
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import saving


def export(
    model: ScoringModel, tokenizer, folder: Path, section: ModelSection, merge_lora: bool
) -> None:
    """Write what `from_pretrained` loads: the model, or its adapter. Collective.

    section: names the base model to merge an adapter into.
    merge_lora: also write the merged model, to `merged/`.

    Raises:
        UserError: it cannot be written; an older export stays whole.
    """
    state = gather_state(model.model, trainable_only=model.has_adapter)
    if distributed.is_main():
        aside = durable.aside(folder)
        shutil.rmtree(aside, ignore_errors=True)
        with saving(aside):
            _save(model, state, aside)
            tokenizer.save_pretrained(aside)
            if merge_lora:
                _save_merged(section, aside)
                tokenizer.save_pretrained(aside / "merged")
            durable.publish(aside, folder, replace=True)
    distributed.barrier()


def gather_state(model: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, {} on other ranks. Collective: parameters are gathered singly.

    A Parameter with two names (tied embeddings) becomes one tensor with two names.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if trainable_only and not value.requires_grad:
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


def _save(model: ScoringModel, state: dict[str, Tensor], folder: Path) -> None:
    # The attention of this run is registered here alone: whoever loads the model has another.
    text = model.causal_lm.config
    attention, text._attn_implementation = text._attn_implementation, None
    try:
        model.model.save_pretrained(folder, state_dict=state)
    finally:
        text._attn_implementation = attention


def _save_merged(section: ModelSection, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        section.path, dtype=section.torch_dtype, trust_remote_code=section.trust_remote_code
    )
    PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(folder / "merged")
