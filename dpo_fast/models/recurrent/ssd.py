"""Mamba-2's state space duality along a row of trees (Dao and Gu 2024, arXiv:2405.21060, section 6).

The scan itself is transformers' function, or the kernel of mamba-ssm that transformers has in its place.
Both take the states that segments begin with and give those that they end with, and both are
differentiable in them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.recurrent.segments import CHUNK, by_levels


def chunk_scan(
    plan: AttentionPlan,
    scan: Callable,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: None = None,
    return_final_states: bool = False,
    **options,
) -> Tensor:
    """A scan over a row, every sequence by itself.

    A step of length dt = 0 leaves the state as it is: exp(0 A) = 1, and dt B x = 0. So steps are made here,
    in fp32 as the kernels make them, before segments are filled up with zeros.

    scan: a function of transformers, with the arguments of mamba-ssm's `mamba_chunk_scan_combined`.
    hidden_states: [1, N, heads, dim]. dt: [1, N, heads]. A, D, dt_bias: [heads].
    B, C: [1, N, groups, state].

    Gives [1, N, heads, dim].
    """
    if initial_states is not None or return_final_states or z is not None:
        raise ValueError("a row of trees begins anew, leaves no state, and is gated after the scan")
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)

    def batch(rows, state, final):
        x, steps, b, c = rows
        given = scan(
            x,
            steps,
            A,
            b,
            c,
            chunk_size=_shortened(chunk_size, x.shape[1]),
            D=D,
            initial_states=state,
            return_final_states=final,
            **options,
        )
        return given if final else (given, None)

    return by_levels(plan, batch, hidden_states, dt, B, C)


def _shortened(chunk_size: int, tokens: int) -> int:
    """A chunk for segments of so many tokens: PyTorch's scan fills every segment up to whole chunks."""
    return min(chunk_size, max(CHUNK, 1 << (tokens - 1).bit_length()))


def not_fused(plan: AttentionPlan, fused: Callable, *arguments, **options) -> None:
    """In the place of mamba-ssm's kernel for a whole layer, which knows of no trees.

    Where it gives None, as transformers' own function does, a layer goes on with its parts.
    """
