"""A head whose rows are spread over the ranks of a process group (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from dpo_fast.ops.linear_logp.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


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

        A DTensor knows its group and all sizes, so for it nothing is sent.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: a DTensor that is not sharded by rows over one dimension of its mesh; or a rank
                has no rows. All ranks say so, and none waits for the others.
        """
        if is_dtensor(weight_VD):
            return cls._of_dtensor(weight_VD, group)
        if not dist.is_initialized():
            raise RuntimeError("VocabShard.of needs torch.distributed.init_process_group first")
        sizes = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, weight_VD.shape[0], group=group)
        rank = dist.get_rank(group)
        _check_rows(min(sizes), sum(sizes), len(sizes))
        return cls(group, sum(sizes[:rank]), sum(sizes), max(sizes))

    @classmethod
    def _of_dtensor(cls, weight_VD: DTensor, group: dist.ProcessGroup | None) -> VocabShard:
        dim, mesh = sharded_dim(weight_VD), weight_VD.device_mesh
        if group not in (None, mesh.get_group(dim)):
            raise ValueError("a DTensor brings its own process group: leave group out")
        vocab = weight_VD.shape[0]
        largest = -(
            -vocab // mesh.size(dim)
        )  # as DTensor cuts: the last ranks have fewer rows, or none
        _check_rows(vocab - (mesh.size(dim) - 1) * largest, vocab, mesh.size(dim))
        first = min(mesh.get_local_rank(dim) * largest, vocab)
        rows, expected = len(weight_VD.to_local()), min(largest, vocab - first)
        if rows != expected:
            raise ValueError(
                f"this rank holds {rows} of {vocab} rows of the weight, and DTensor's own cut gives it "
                f"{expected}: pass weight.to_local() and VocabShard.of(weight.to_local(), group)"
            )
        return cls(mesh.get_group(dim), first, vocab, largest)

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


def _check_rows(fewest: int, vocab: int, ranks: int) -> None:
    if fewest < 1:
        raise ValueError(
            f"some of the {ranks} ranks have none of the {vocab} rows of the weight: spread it over fewer "
            "ranks, or pass it whole"
        )


def sharded_dim(weight_VD: DTensor) -> int:
    """The dimension of the mesh over which rows lie. Raises ValueError if there is not exactly one."""
    placements = weight_VD.placements
    dims = [dim for dim, placement in enumerate(placements) if placement.is_shard(0)]
    others = [p for dim, p in enumerate(placements) if dim not in dims and not p.is_replicate()]
    if len(dims) != 1 or others:
        raise ValueError(
            f"the weight is a DTensor with placements {placements}: a VocabShard needs Shard(0) over one "
            "dimension of the mesh, and Replicate() over others. Without a shard linear_logp gathers it"
        )
    return dims[0]


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
