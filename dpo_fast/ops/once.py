"""Autograd functions that have no second derivative, and say so where one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def once_differentiable(backward: Callable) -> Callable:
    """As PyTorch's decorator of that name, for functions whose gradients depend on what is saved.

    PyTorch's looks at the incoming gradients alone. Where those are constants, as of a sum, gradients that
    `create_graph=True` asks for come without a graph, and a penalty on them would do nothing.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
        return tuple(
            None if x is None else _Last.apply(x.detach().requires_grad_(), name) for x in found
        )

    return wrapper


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            f"{ctx.name} of dpo_fast has no second derivative, and one is asked for through gradients that "
            "create_graph=True made: leave out what depends on them, or compute log-probs from logits, "
            "(hidden @ weight.T).log_softmax(-1)"
        )
