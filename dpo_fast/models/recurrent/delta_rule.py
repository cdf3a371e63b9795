"""Gated delta rules along a row of trees: Gated DeltaNet (arXiv 2412.06464), Kimi's KDA (arXiv 2510.26692).

The rule itself is transformers' function, or the kernel that transformers has in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.recurrent.segments import by_flat_levels, by_levels


def delta_rule(
    plan: AttentionPlan,
    rule: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    cu_seqlens: None = None,
    **options,
) -> tuple[Tensor, None]:
    """A gated delta rule over a row, every sequence by itself.

    With g, beta and the key zero a token leaves the state as it is.

    rule: a function of transformers, with the arguments of flash-linear-attention's.
    query, key, value: [1, N, heads, dim]. g, beta: [1, N, heads]; g of KDA [1, N, heads, dim].
    """
    if initial_state is not None or output_final_state or cu_seqlens is not None:
        raise ValueError(
            "a row of trees begins anew, leaves no state, and its plan tells its sequences"
        )

    def states(state: Tensor | None, final: bool) -> dict:
        return {"initial_state": state, "output_final_state": final, **options}

    if takes_offsets(rule):

        def flat(rows, offsets, state, final):
            *qkv, decay, rate = rows
            return rule(*qkv, g=decay, beta=rate, cu_seqlens=offsets, **states(state, final))

        return by_flat_levels(plan, flat, query, key, value, g, beta), None

    def batch(rows, state, final):
        *qkv, decay, rate = rows
        return rule(*qkv, g=decay, beta=rate, **states(state, final))

    return by_levels(plan, batch, query, key, value, g, beta), None


def kimi_delta_rule(plan: AttentionPlan, rule: Callable, *arguments, **options):
    """As `delta_rule`, in shorter chunks: transformers' PyTorch makes [chunk, chunk, dim] numbers of each.

    With 16 tokens in place of 64 it takes a seventh of the time and a quarter of the memory. Kernels
    have a length of their own.
    """
    return delta_rule(plan, rule, *arguments, **{"chunk_size": 16} | options)


def takes_offsets(rule: Callable) -> bool:
    """Whether transformers has a kernel for segments of unequal length in the place of its function.

    Its wrapper keeps the function that it calls in its closure. With the package kernels the wrapper is
    in the closure of a module's forward.
    """
    if isinstance(rule, nn.Module):
        rule = inspect.getclosurevars(type(rule).forward).nonlocals.get("func", rule)
    names = inspect.getclosurevars(rule).nonlocals if inspect.isfunction(rule) else {}
    return "cu_seqlens" in inspect.signature(names.get("implementation", rule)).parameters
