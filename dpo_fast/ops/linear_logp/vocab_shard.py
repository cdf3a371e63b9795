"""A head whose rows are spread over the ranks of a process group (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary. Slices lie in the order of the ranks.

    Hidden states and targets are the same on every rank; targets count from the whole vocabulary's start.

    group: the process group; None is the default one.
    first: column of the whole head that is row 0 of this rank's weight.
    vocab: columns of the whole head.
    largest: rows of the largest slice; all ranks choose their schedule by it, so it is the same.
    """

    group: dist.ProcessGroup | None
    first: int
    vocab: int
    largest: int

    @classmethod
    def of(cls, weight_VD: Tensor, group: dist.ProcessGroup | None = None) -> VocabShard:
        """The shard of the rank that holds `weight_VD`. Collective, and waits: call it once, not per step.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not dist.is_initialized():
            raise RuntimeError("VocabShard.of needs torch.distributed.init_process_group first")
        sizes = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, weight_VD.shape[0], group=group)
        rank = dist.get_rank(group)
        return cls(group, sum(sizes[:rank]), sum(sizes), max(sizes))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in new memory. Collective."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in new memory. Collective."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation) -> Tensor:
        result = tensor.contiguous().clone()
        dist.all_reduce(result, operation, group=self.group)
        return result


def whole_vocabulary(weight_VD: Tensor, shard: VocabShard | None) -> int:
    """V of the whole head. Raises ValueError if the shard was made for another weight."""
    if shard is None:
        return weight_VD.shape[0]
    rows = weight_VD.shape[0]
    if rows > shard.largest or shard.first + rows > shard.vocab:
        raise ValueError(
            f"shard={shard} does not fit a weight of {rows} rows; make it with VocabShard.of(weight)"
        )
    return shard.vocab
