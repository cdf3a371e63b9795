"""Layers that get no keywords, or whose functions get none, and how they are told the plan of a row.

Such a layer gets a forward of its own, in this model alone. Where no keyword reaches it, the plan comes in
the place of the padding mask, which a row of trees has not got: as an argument it is there again when the
layer is recomputed.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.recurrent.convolution import convolve
from dpo_fast.models.recurrent.ssd import not_fused
from dpo_fast.models.recurrent.unfolded import over_sequences, selective_scan

# What the forwards of such layers call, without keywords.
FUNCTIONS: dict[str, Callable] = {
    "causal_conv1d_fn": convolve,
    "mamba_selective_scan": selective_scan,
    "mamba_inner_fn": not_fused,
}
SCAN = frozenset({"causal_conv1d_fn", "mamba_selective_scan"})
CONVOLUTION = frozenset({"causal_conv1d_fn"})


class Told(NamedTuple):
    """How a kind of layer is served.

    by: classes of modules round it that put the plan in the mask's place; none if keywords come.
    calls: functions for which its forward gets ours. If it calls others, in another version of
        transformers, or if none is named, all of the layer runs sequence by sequence.
    """

    by: tuple[str, ...] = ()
    calls: frozenset[str] = frozenset()


LAYERS = {
    "MambaMixer": Told(("MambaModel",), SCAN),
    "FalconMambaMixer": Told(("FalconMambaModel",), SCAN),
    "JambaMambaMixer": Told(("JambaMambaDecoderLayer",), SCAN),
    "ZambaMambaMixer": Told(calls=SCAN),
    "RecurrentGemmaRecurrentBlock": Told(),
    "ZayaCCAProjection": Told(("ZayaAttention",)),
    # Two in every layer, beside those inside its attention (`by_sequence`).
    "InklingShortConvolution": Told(("InklingDecoderLayer",)),
    "Inkling2ShortConvolution": Told(("Inkling2SlidingDecoderLayer", "Inkling2FullDecoderLayer")),
    # Until transformers 5.20 or later they hand no keywords on.
    "Lfm2ShortConv": Told(("Lfm2DecoderLayer",), CONVOLUTION),
    "Lfm2MoeShortConv": Told(("Lfm2MoeDecoderLayer",), CONVOLUTION),
}


def told(module: nn.Module) -> Told | None:
    """How this layer is served, if it is one of these. FSDP gives modules a class below their own."""
    names = [kind.__name__ for kind in type(module).__mro__]
    how = next((LAYERS[name] for name in names if name in LAYERS), None)
    return None if how and how.calls == CONVOLUTION and hands_on(module) else how


def hands_on(module: nn.Module) -> bool:
    """Whether a module's forward calls something with the keywords that it gets itself."""
    code = dis.get_instructions(inspect.unwrap(type(module).forward))
    return any(each.opname == "CALL_FUNCTION_EX" for each in code)


def serve_told(model: nn.Module) -> None:
    """Have those of a model's layers that `LAYERS` has compute rows of trees, in place."""
    for module in model.modules():
        inside = [how for each in module.modules() if (how := told(each))]
        if any(type(module).__name__ in how.by for how in inside):
            replace_forward(module, _telling)
        if told(module):
            replace_forward(module, _mixing)


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Give a module a forward round its own, a method that copies of the module have, too."""
    if not hasattr(module, "forward_of_batches"):
        module.forward_of_batches = module.forward
        module.forward = MethodType(forward, module)


def _telling(module: nn.Module, *arguments, attention_mask=None, **options):
    """The forward of a module that hands masks on, but no keywords."""
    plan = options.get("plan")
    if isinstance(plan, AttentionPlan):
        if "conv_mask" in options:  # of Inkling's convolutions
            return module.forward_of_batches(
                *arguments, attention_mask=attention_mask, **(options | {"conv_mask": plan})
            )
        of_many = isinstance(attention_mask, dict)  # of ZAYA's attention
        attention_mask = {**attention_mask, "conv": plan} if of_many else plan
    return module.forward_of_batches(*arguments, attention_mask=attention_mask, **options)


def _mixing(module: nn.Module, *arguments, **options):
    """A layer's forward. The plan is among its arguments, where it has a place for one or for a mask."""
    plans = [each for each in (*arguments, *options.values()) if isinstance(each, AttentionPlan)]
    options.pop("plan", None)
    if not plans:
        return module.forward_of_batches(*arguments, **options)
    check_whole_row(plans[0])
    options = dict(zip(options, _without_plans(options.values())))
    return _by_plan(module, plans[0], *_without_plans(arguments), **options)


def _without_plans(values) -> list:
    return [None if isinstance(each, AttentionPlan) else each for each in values]


@torch.compiler.disable  # it computes with indices of the row
def _by_plan(module: nn.Module, plan: AttentionPlan, *arguments, **options):
    forward, calls = inspect.unwrap(type(module).forward), told(module).calls
    if not calls or not calls <= set(forward.__code__.co_names):
        return over_sequences(module.forward_of_batches, plan, *arguments, **options)
    return _with_functions(forward, plan)(module, *arguments, **options)


def _with_functions(forward: FunctionType, plan: AttentionPlan) -> FunctionType:
    """The same code, which finds our functions under the names that it calls, bound to a plan."""
    names = forward.__globals__
    ours = {
        name: partial(function, plan, names[name])
        for name, function in FUNCTIONS.items()
        if name in names
    }
    changed = FunctionType(
        forward.__code__, names | ours, None, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def check_whole_row(plan: AttentionPlan) -> None:
    """Raises UserError if ranks have slices of a row: they exchange what attention needs, no states."""
    if plan.group is not None:
        raise UserError(
            f"parallel.sequence_parallel={plan.group.size} cannot be honoured: ranks share attention "
            "alone, and this model has layers that carry a state along the tokens. Set "
            "parallel.sequence_parallel=1"
        )
