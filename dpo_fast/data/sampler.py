"""The examples of every step and rank: a pure function of seed, epoch and step, so resume is exact.

`Sampler` counts examples and `TokenSampler` counts tokens. Both answer the same questions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dpo_fast.data.grouping import SamePrompt
from dpo_fast.data.mixture import Mixture
from dpo_fast.data.own_order import OwnOrder
from dpo_fast.data.packing import Costs


class BatchSampler(Protocol):
    """Global batches, and each rank's micro-batches of them, as places in the data set.

    same_prompt: what brings examples of one prompt together, if anything does.
    """

    same_prompt: SamePrompt | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of the first epoch."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of every rank in every step."""

    def steps(self, epochs: float) -> int:
        """Optimiser steps of that many epochs, at least 1."""

    def global_batch(self, step: int) -> list[int]:
        """Examples of optimiser step `step`, counted from 0 over all epochs."""

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """This rank's micro-batches of a step: always `accumulation` of them, some may be empty."""


@dataclass(frozen=True)
class Sampler:
    """Global batches of `global_batch_size` examples, in micro-batches of `micro_batch_size`.

    Every epoch is a fresh seeded permutation, or file order without `shuffle`, or what a mixture draws.
    The examples of a step do not depend on micro_batch_size or world_size. The last batch of an epoch
    may be smaller. Then micro-batches are short or empty, but every rank has the same number of them.

    size: examples of an epoch. first_epoch: the epoch of step 0.
    same_prompt: puts the examples of one prompt of an epoch one after the other.
    own: a user's own order of the examples of an epoch, in place of all that.
    left_out: places in the data that no batch holds. The steps of all other examples stay as they are.
    """

    size: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    first_epoch: int = 0
    mixture: Mixture | None = None
    left_out: frozenset[int] = frozenset()
    same_prompt: SamePrompt | None = None
    own: OwnOrder | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size // self.global_batch_size)

    @property
    def accumulation(self) -> int:
        return -(-self.global_batch_size // (self.micro_batch_size * self.world_size))

    def steps(self, epochs: float) -> int:
        return max(round(epochs * self.steps_per_epoch), 1)

    def global_batch(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._order(self.first_epoch + epoch)
        batch = order[
            index * self.global_batch_size : (index + 1) * self.global_batch_size
        ].tolist()
        return _without(self.left_out, batch)

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        batch = self.global_batch(step)
        size, world = self.micro_batch_size, self.world_size
        starts = [(k * world + rank) * size for k in range(self.accumulation)]
        return [batch[start : start + size] for start in starts]

    def _order(self, epoch: int) -> np.ndarray:
        if self.own is not None:
            return self.own.order(epoch)
        if self.same_prompt is not None:
            return _together(replace(self, first_epoch=0), epoch)
        if self.mixture is not None:
            return _drawn(self.mixture, self.seed, epoch)
        return _permutation(self.size, self.seed, epoch) if self.shuffle else np.arange(self.size)


class TokenSampler:
    """Micro-batches of whole examples, filled to at most `budget` tokens.

    The micro-batches of an epoch follow from costs, budget, seed and epoch, not from world_size, and
    come in a seeded order. Every step takes the next `accumulation` x `world_size` of them. The last
    step of an epoch has fewer, and some ranks get empty ones. Epochs may differ by a few micro-batches.

    costs: tokens of every example in the layout of the run.
    mixture: what draws the examples of an epoch; by default an epoch is all of them.
    left_out, same_prompt: as of `Sampler`.
    global_batch_size: examples that a step should have on average.
    accumulation: micro-batches of a rank in a step; by default as many as bring the examples of the
        first epoch's steps nearest to `global_batch_size`.

    Raises:
        ValueError: an example that is larger than the budget.
    """

    def __init__(
        self,
        costs: Costs,
        budget: int,
        global_batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        first_epoch: int = 0,
        accumulation: int | None = None,
        mixture: Mixture | None = None,
        left_out: frozenset[int] = frozenset(),
        same_prompt: SamePrompt | None = None,
    ) -> None:
        self.mixture, self.left_out, self.same_prompt = mixture, left_out, same_prompt
        self.costs, self.budget, self.global_batch_size = costs, budget, global_batch_size
        self.world_size, self.seed, self.shuffle = world_size, seed, shuffle
        self.first_epoch = first_epoch
        self._bins: Callable[[int], Bins] = functools.lru_cache(2)(self._fill)
        self._bins_of: Callable[[int], int] = functools.cache(lambda epoch: len(self._bins(epoch)))
        self.accumulation = accumulation or self._nearest_accumulation()

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_of(self.first_epoch)

    @property
    def fill(self) -> float:
        """Share of the first epoch's budget that tokens fill, 0 to 1."""
        bins = self._bins(self.first_epoch)
        return bins.tokens / (len(bins) * self.budget)

    @property
    def examples_per_step(self) -> float:
        """Examples of a step, on average over the first epoch's full steps."""
        return self._examples_per_bin() * self.bins_per_step

    def steps(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        counts = [self._steps_of(self.first_epoch + epoch) for epoch in range(int(whole))]
        rest = part * self._steps_of(self.first_epoch + int(whole)) if part else 0
        return max(sum(counts) + round(rest), 1)

    def global_batch(self, step: int) -> list[int]:
        return [example for examples in self._bins_at(step) for example in examples]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        mine = self._bins_at(step)[rank :: self.world_size]
        return mine + [[] for _ in range(self.accumulation - len(mine))]

    @property
    def bins_per_step(self) -> int:
        """Micro-batches of all ranks in a step."""
        return self.accumulation * self.world_size

    def _examples_per_bin(self) -> float:
        size = len(self.costs.sizes_P) if self.mixture is None else len(self.mixture)
        return size / self._bins_of(self.first_epoch)

    def _nearest_accumulation(self) -> int:
        return max(round(self.global_batch_size / self._examples_per_bin() / self.world_size), 1)

    def _steps_of(self, epoch: int) -> int:
        return -(-self._bins_of(epoch) // self.bins_per_step)

    def _bins_at(self, step: int) -> list[list[int]]:
        """The micro-batches of a step, of all ranks."""
        epoch = self.first_epoch
        while step >= (steps := self._steps_of(epoch)):
            step, epoch = step - steps, epoch + 1
        bins, start = self._bins(epoch), step * self.bins_per_step
        places = range(start, min(start + self.bins_per_step, len(bins)))
        return [_without(self.left_out, bins[index]) for index in places]

    def _fill(self, epoch: int) -> Bins:
        examples = range(len(self.costs.sizes_P))
        if not self.shuffle:
            return self._packed(examples)
        draw = np.random.default_rng((self.seed, epoch))
        if self.mixture is None:
            order = draw.permutation(examples)
        else:
            order = self.mixture.examples(self.seed, epoch)
        bins = self._packed(order.tolist())
        return Bins([bins[index] for index in draw.permutation(len(bins))], bins.tokens)

    def _packed(self, order: Sequence[int]) -> Bins:
        if self.same_prompt is not None:
            return Bins(*self.same_prompt.bins(self.budget, order))
        bins = self.costs.bins(self.budget, order)
        return Bins(bins, sum(map(self.costs.of, bins)))


def _without(left_out: frozenset[int], batch: list[int]) -> list[int]:
    return [index for index in batch if index not in left_out] if left_out else batch


class Bins(Sequence):
    """The micro-batches of an epoch. Two arrays take a tenth of the memory of lists of examples.

    tokens: of all of them together.
    """

    def __init__(self, bins: list[list[int]], tokens: int) -> None:
        self.tokens = tokens
        self.examples = np.fromiter(itertools.chain.from_iterable(bins), np.int64)
        self.ends = np.cumsum([0, *map(len, bins)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.examples[self.ends[index] : self.ends[index + 1]].tolist()


@functools.lru_cache(maxsize=2)
def _together(sampler: Sampler, epoch: int) -> np.ndarray:
    return sampler.same_prompt.order(replace(sampler, same_prompt=None)._order(epoch))


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).numpy()


@functools.lru_cache(maxsize=2)
def _drawn(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    return mixture.examples(seed, epoch)
