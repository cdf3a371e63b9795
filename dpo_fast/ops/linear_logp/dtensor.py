"""Operands that are DTensors: weights as FSDP2 and tensor parallelism hold them outside of a forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def plain_input(x: Tensor, name: str) -> Tensor:
    """What is given for each row, as a plain tensor: hidden states, logits, targets or labels.

    Raises:
        ValueError: a DTensor whose rows or columns are spread.
    """
    if not isinstance(x, DTensor):
        return x
    if any(not placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}: pass the rows that this rank scores, "
            f"whole, and the same ones of all inputs; {name}.to_local() or {name}.full_tensor() has them"
        )
    return x.to_local()


def plain_weight(x: Tensor | None, hidden: Tensor, kept: tuple[int, ...] = ()) -> Tensor | None:
    """A weight or bias as a plain tensor; a DTensor in the dtype and on the device of `hidden`.

    It is gathered over all dimensions of its mesh but those in `kept`. The gradient comes back as a DTensor
    that lies as x does. It is averaged over the ranks that gathered, which is what FSDP does with weights
    that it gathers itself. Where ranks compute the same (tensor parallelism), the average is that gradient.
    Collective, forward and backward.

    Raises:
        ValueError: a DTensor that holds terms of a sum.
    """
    if not isinstance(x, DTensor):
        return x
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"the weight or bias is a DTensor with placements {x.placements}, terms of a sum that is not "
            "taken yet: pass x.redistribute(placements=[Replicate()])"
        )
    return _plain(x.to(device=hidden.device, dtype=hidden.dtype), kept)


@torch.compiler.disable
def _plain(x: DTensor, kept: tuple[int, ...]) -> Tensor:
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
