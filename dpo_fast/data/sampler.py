"""Which pairs each rank sees at each step: a pure function of seed, epoch and step, so resume is exact."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampler:
    """Global batches of `global_pairs` pairs, in micro-batches of `micro_pairs` on `world_size` ranks.

    Every epoch is a fresh seeded permutation (`shuffle=False`: file order). The pairs of a step do
    not depend on micro_pairs or world_size. The last batch of an epoch may be smaller; then
    micro-batches are short or empty, but every rank has the same number of them.
    """

    size: int
    global_pairs: int
    micro_pairs: int
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size // self.global_pairs)

    @property
    def accumulation(self) -> int:
        return -(-self.global_pairs // (self.micro_pairs * self.world_size))

    def global_batch(self, step: int) -> list[int]:
        """Data-set rows of optimiser step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        return order[index * self.global_pairs : (index + 1) * self.global_pairs]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """This rank's micro-batches of a step: always `accumulation` of them."""
        batch = self.global_batch(step)
        size, world = self.micro_pairs, self.world_size
        starts = [(k * world + rank) * size for k in range(self.accumulation)]
        return [batch[start : start + size] for start in starts]

    def _order(self, epoch: int) -> list[int]:
        return _permutation(self.size, self.seed, epoch) if self.shuffle else list(range(self.size))


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()
