"""Rows by their index, with a backward pass that gives the same sums every time."""

from __future__ import annotations

import torch
from torch import Tensor


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = values.shape
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape)
        if grad.is_cuda:  # sorts by index, and one thread adds all of a row
            return total.index_put_((index,), grad, accumulate=True), None
        return total.index_add_(0, index, grad), None


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index] along the first dimension; an index may come more than once.

    The gradients of a row that is taken several times are added in the order of the index, on a CPU and
    on a GPU. PyTorch's own `index_select` adds them on a GPU as they come, and `values[index]` on a CPU.

    values: [R, ...]. index: int64 [T].
    """
    return _Take.apply(values, index)
