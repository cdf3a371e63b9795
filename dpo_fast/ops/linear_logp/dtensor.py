"""Operands that are DTensors: weights as FSDP2 and tensor parallelism hold them outside of a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Asked of what DTensors alone have: to import their class takes as long as PyTorch itself."""
    return hasattr(x, "placements")


def plain_input(x: Tensor, name: str) -> Tensor:
    """What is given for each row, as a plain tensor: hidden states, logits, targets or labels.

    Raises:
        ValueError: a DTensor whose rows or columns are spread.
    """
    if not is_dtensor(x):
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
    if not is_dtensor(x):
        return x
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"the weight or bias is a DTensor with placements {x.placements}, terms of a sum that is not "
            "taken yet: pass x.redistribute(placements=[Replicate()])"
        )
    from dpo_fast.ops.linear_logp.gathered import gathered

    return gathered(x.to(device=hidden.device, dtype=hidden.dtype), kept)
