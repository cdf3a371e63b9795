"""Experts whose parameters every rank must treat alike, whatever its tokens are.

A module that is called for some tokens alone gets gradients on the ranks that have such tokens. At ZeRO-3
it is also gathered on these alone, and the others wait for ever. transformers 5 has the experts of a layer
in one tensor, which needs nothing. Models with code of their own have a module for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

DRAWING = ("PhimoeTopKRouter",)  # in training they draw experts at random: SparseMixer


def keep_from_drawing(model: nn.Module) -> None:
    """Have routers that draw experts in training choose the best ones, as they do in evaluation.

    A preference loss compares two passes over the same tokens. Only experts whose scores are as good as
    alike (`router_jitter_noise`) give such a router a gradient then; else it stays as it is.
    """
    for module in model.modules():
        if type(module).__name__ in DRAWING:
            module.train = MethodType(_in_evaluation, module)
            module.train()


def _in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def experts_together(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose forward leaves out some of their parameters, by the tokens that come.

    Those that choose among experts that are modules of their own, and LongCat's experts, where a token may
    choose to be left as it is. And peft's adapters on a parameter, which read weights outside of the
    forward of any module that holds them.
    """
    for module in model.modules():
        leaves_out = _chooses_modules(module) or getattr(module, "zero_expert_num", 0)
        if leaves_out or adapts_a_parameter(module):
            yield module


def join_experts(model: nn.Module, stage: int) -> int:
    """Have all ranks gather and reduce these parameters alike. DeepSpeed is not initialised yet.

    At ZeRO-3 they are leaf modules of DeepSpeed: gathered whole, and with a gradient of zeros where there
    is none. Below, their input depends on all of their parameters, by a factor of 0.

    Returns:
        How many modules it concerns.
    """
    from deepspeed.utils import set_z3_leaf_module

    found = list(experts_together(model))
    for module in found:
        if stage == 3:
            set_z3_leaf_module(module, True)
        elif not adapts_a_parameter(module):
            module.register_forward_pre_hook(_begin_with_all, with_kwargs=True)
    return len(found)


def _begin_with_all(
    module: nn.Module, arguments: tuple, keywords: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """The inputs of a module, the first of them plus 0 times each of its parameters that is trained.

    The gradient of a parameter is complete when that of this input is, so they all come to DeepSpeed there,
    in the same order on every rank: ZeRO-2 reduces them in the order in which they come.
    """
    trained = [each for each in module.parameters() if each.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return None
    nothing = 0.0 * sum(each.reshape(-1)[0] for each in trained)
    if arguments:
        first, *others = arguments
        return (first + nothing.to(first.dtype), *others), keywords
    name = next(key for key, value in keywords.items() if isinstance(value, Tensor))
    value = keywords[name]
    return arguments, keywords | {name: value + nothing.to(value.dtype)}


def _chooses_modules(module: nn.Module) -> bool:
    """Whether a child is a list or dictionary of experts, each a module."""
    return any(
        "expert" in name and isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1
        for name, child in module.named_children()
    )


def adapts_a_parameter(module: nn.Module) -> bool:
    """Whether it is peft's wrapper of a layer one of whose parameters has an adapter."""
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "parameter_name")
