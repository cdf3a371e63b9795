"""Experts whose parameters DeepSpeed must gather together at ZeRO-3.

A module that is called for some tokens alone is gathered on the ranks that have such tokens, and the others
wait for ever. DeepSpeed's leaf modules are gathered whole, whatever runs in them, and experts that no token
came to get a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def experts_together(model: nn.Module) -> Iterator[nn.Module]:
    """Modules to gather whole: what chooses among its own modules, and adapters on experts' parameters.

    transformers 5 has the experts of a layer in one tensor, which needs no more. Models with code of their
    own, and some of transformers, have a module for each. An adapter of peft on a parameter reads its own
    weights and the parameter outside of any module's forward.
    """
    for module in model.modules():
        if _has_modules_for_experts(module) or _adapts_a_parameter(module):
            yield module


def set_leaf_modules(model: nn.Module) -> int:
    """Make them leaf modules of DeepSpeed, before it is initialised. Returns how many there are."""
    from deepspeed.utils import set_z3_leaf_module

    found = list(experts_together(model))
    for module in found:
        set_z3_leaf_module(module, True)
    return len(found)


def _has_modules_for_experts(module: nn.Module) -> bool:
    """Whether a child is a list or dictionary of experts, each a module with parameters."""
    for name, child in module.named_children():
        if "expert" in name and isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            return len(child) > 1
    return False


def _adapts_a_parameter(module: nn.Module) -> bool:
    """Whether it is peft's wrapper of a layer one of whose parameters has an adapter."""
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "parameter_name")
