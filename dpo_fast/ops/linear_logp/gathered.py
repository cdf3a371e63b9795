"""A DTensor gathered, with its gradient. Imported for the first DTensor: it brings torch._dynamo along."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


@torch.compiler.disable
def gathered(x: DTensor, kept: tuple[int, ...]) -> Tensor:
    """This rank's plain tensor of x, gathered over all dimensions of its mesh but those in `kept`."""
    return _Gathered.apply(x, kept)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: DTensor, kept: tuple[int, ...]) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        here = {dim: x.placements[dim] for dim in kept}
        ctx.partial = [here.get(dim, Partial()) for dim in range(x.device_mesh.ndim)]
        gathered = [here.get(dim, Replicate()) for dim in range(x.device_mesh.ndim)]
        ctx.ranks = math.prod(ctx.mesh.size(d) for d in range(ctx.mesh.ndim) if d not in kept)
        ctx.shape, ctx.stride = x.shape, x.stride()
        return x.redistribute(placements=gathered).to_local()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        summed = DTensor.from_local(
            grad / ctx.ranks,
            ctx.mesh,
            ctx.partial,
            run_check=False,
            shape=ctx.shape,
            stride=ctx.stride,
        )
        return summed.redistribute(placements=ctx.placements), None
