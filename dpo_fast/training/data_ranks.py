"""Which ranks see the same data: with `parallel.sequence_parallel` N, every N neighbours share a batch.

To samplers and to sums over the data such a group is one rank, its data rank. Weights and optimiser states
are sharded over all ranks, as without it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from dpo_fast.models.ulysses import SequenceGroup
from dpo_fast.training import distributed
from dpo_fast.training.parallel_section import ParallelSection

_group: SequenceGroup | None = None
_made: dict[int, tuple[object, SequenceGroup]] = {}  # by size; each with the ranks it is of


def join(parallel: ParallelSection) -> None:
    """Join the process group, and the group of the ranks that share batches with this one. Collective."""
    global _group
    distributed.init_distributed(parallel.timeout_minutes)
    _group = _of_size(parallel.sequence_parallel) if parallel.sequence_parallel > 1 else None


def forget() -> None:
    """After the process group has been left: what was made of its ranks is gone with it."""
    global _group
    _group = None
    _made.clear()


def _of_size(size: int) -> SequenceGroup:
    everyone = dist.group.WORLD
    if size not in _made or _made[size][0] is not everyone:
        for first in range(0, dist.get_world_size(), size):  # every rank takes part in making each
            group = dist.new_group(range(first, first + size))
            if first <= dist.get_rank() < first + size:
                _made[size] = everyone, SequenceGroup(group)
    return _made[size][1]


def shared_or_whole(parallel: dict[str, Any] | None, world_size: int) -> dict[str, Any]:
    """A recorded section `parallel` for so many ranks: where N does not divide them, each has whole rows.

    Log-probs are the same.
    """
    parallel = dict(parallel or {})
    shared = parallel.get("sequence_parallel", 1)
    whole = isinstance(shared, int) and shared > 1 and world_size % shared
    return parallel | ({"sequence_parallel": 1} if whole else {})


def sequence_group() -> SequenceGroup | None:
    """The ranks that share the tokens of a batch with this one; None if it has all tokens itself."""
    return _group


def data_ranks() -> int:
    """How many batches there are at a time."""
    return distributed.world_size() // (_group.size if _group else 1)


def data_rank() -> int:
    """Which of these batches this rank has."""
    return distributed.rank() // (_group.size if _group else 1)


def counts() -> bool:
    """Whether this rank is the one that stands for its group, where a batch shall count once."""
    return _group is None or _group.rank == 0


def sum_once(values: Tensor) -> Tensor:
    """The sum over all data, in place: ranks that share a batch have the same values. Collective."""
    return distributed.all_sum(values if counts() else values.zero_())
