"""Trained adapters, as SFT with LoRA leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


def write_adapter(folder: Path, base: Path, *, seed: int = 0, tokenizer=None, **options) -> Path:
    """An adapter whose weights are far from none.

    tokenizer: is saved beside it; the model gets rows for tokens that it lacks. options: of LoraConfig.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    options = {"r": 4, "target_modules": TARGETS, "lora_dropout": 0.1} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad and "lora_" not in name:
            parameter.data.mul_(1.2).add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
