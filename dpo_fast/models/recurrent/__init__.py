"""Layers that carry a state along the tokens, so that sequences may share a row.

The layers stay transformers' own. They mix tokens by functions of their module, a convolution and a
recurrence, which get the keywords that the model is called with. `serve` puts a function of ours round
each. With a `plan` among the keywords it computes the row as trees; without one it passes the call on as
it is, so models that are called without a plan compute what they did.

To serve another kind of layer, write a function (plan, original, *arguments, **keywords), and enter it
in `FUNCTIONS` by the name that the original has in transformers. `segments.by_levels` does what
recurrences have in common, `convolution.convolve` what convolutions have.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.recurrent.convolution import convolve
from dpo_fast.models.recurrent.delta_rule import delta_rule, kimi_delta_rule
from dpo_fast.models.recurrent.lightning import LAYER as LIGHTNING
from dpo_fast.models.recurrent.lightning import lightning
from dpo_fast.models.recurrent.ssd import chunk_scan, not_fused
from dpo_fast.models.recurrent.told import (
    check_whole_row,
    hands_on,
    replace_forward,
    serve_told,
    told,
)

# By name in transformers' modules.
FUNCTIONS: dict[str, Callable] = {
    "causal_conv1d_fn": convolve,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": kimi_delta_rule,
    "mamba2_chunk_scan": chunk_scan,
    "mamba2_split_conv1d_scan_combined": not_fused,
}
# What a layer's forward has to call for it to be served: all of one line.
KINDS: tuple[frozenset[str], ...] = (
    frozenset({"causal_conv1d_fn", "torch_chunk_gated_delta_rule"}),
    frozenset({"causal_conv1d_fn", "chunk_kimi_delta_attention"}),
    frozenset({"causal_conv1d_fn", "mamba2_chunk_scan"}),
)
# Ends of names of layers that have a convolution and nothing else that mixes tokens: LFM2's.
CONVOLUTIONS = ("ShortConv",)


def serve(model: nn.Module) -> None:
    """Put our functions round those of the modules of transformers that a model's layers are from.

    Layers that are not told by keywords get a forward of their own, in this model alone (`told`).
    """
    serve_told(model)
    for module in model.modules():
        if type(module).__name__ == LIGHTNING:
            replace_forward(module, lightning)
    for kind in {type(module) for module in model.modules() if _by_functions(module)}:
        names = vars(module_of(kind))
        for name in FUNCTIONS.keys() & names.keys():
            if not hasattr(names[name], "original"):
                names[name] = put_round(FUNCTIONS[name], names[name])


def served(module: nn.Module) -> bool:
    """Whether this is a layer that carries a state, of a kind that is served."""
    by_name = type(module).__name__ == LIGHTNING or told(module) is not None
    return by_name or _by_functions(module)


def _by_functions(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    if not inspect.isfunction(forward) or not forward.__code__.co_flags & inspect.CO_VARKEYWORDS:
        return False  # the plan would not reach its functions
    called = set(forward.__code__.co_names) & vars(module_of(type(module))).keys()
    alone = type(module).__name__.endswith(CONVOLUTIONS) and "causal_conv1d_fn" in called
    alone = alone and hands_on(module)
    return alone or any(kind <= called for kind in KINDS)


def module_of(kind: type[nn.Module]) -> ModuleType:
    """The module that the names in a class's forward are from."""
    return sys.modules[inspect.unwrap(kind.forward).__module__]


def put_round(ours: Callable, original: Callable) -> Callable:
    """The original for calls without a plan, ours for those with one."""
    # It computes with indices of the row. The layer round it may be compiled.
    by_plan = torch.compiler.disable(ours)

    @functools.wraps(original)
    def mixing(*arguments, plan=None, **keywords):
        if not isinstance(plan, AttentionPlan):  # none, or the mark of a trial
            return original(*arguments, **keywords)
        check_whole_row(plan)
        return by_plan(plan, original, *arguments, **keywords)

    mixing.original = original
    return mixing
