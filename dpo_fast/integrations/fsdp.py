"""FSDP2 through accelerate, as transformers' and TRL's trainers set it up."""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from dpo_fast.errors import UserError


def prepare_fsdp(trainer: Trainer) -> None:
    """Have FSDP2, where it is on, leave the dtype of outputs alone. Call it before any model is sharded.

    In mixed precision accelerate's policy casts what every wrapped module returns, the head's fp32
    log-probabilities too, and a log-prob of -200 in bf16 is good to one nat.

    Raises:
        UserError: FSDP1, which keeps weights as parts of one flat tensor; or FSDP where accelerate leaves
            it out without a word.
    """
    if not trainer.args.fsdp:
        return
    if not trainer.is_fsdp_enabled:
        raise UserError(
            f"fsdp={trainer.args.fsdp} cannot be honoured: accelerate shards on GPUs and their like alone; "
            "leave it out on CPUs"
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp_version={plugin.fsdp_version} is not supported: set fsdp_config={{'version': 2}}, which "
            "shards with fully_shard, or use DDP or DeepSpeed ZeRO"
        )
    if plugin.mixed_precision_policy is not None:
        policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        plugin.mixed_precision_policy = policy


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model that is not trained as the policy will be. accelerate itself wants an optimiser."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    sharded = fsdp2_prepare_model(accelerator, model)
    # A policy keeps its head and embeddings for the backward pass, which frees them; here is none.
    sharded.set_reshard_after_forward(True)
    return sharded.eval()
