"""Mixtures: how many examples of each source an epoch has, and which.

Shares are exact: quotas by the largest remainder. Each source goes through all of its examples, in a
seeded order, before one comes again, over the borders of epochs; then it is shuffled anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from dpo_fast.errors import UserError


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights as shares that add up to 1. Decimals are taken as written, so 0.7 is seven tenths."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def quotas(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers that add up to `total`, by the largest remainder; of equal ones the first."""
    exact = [total * share for share in shares]
    floors = [value.numerator // value.denominator for value in exact]
    ranked = sorted(range(len(shares)), key=lambda index: (floors[index] - exact[index], index))
    for index in ranked[: total - sum(floors)]:
        floors[index] += 1
    return floors


def epoch_quotas(sizes: Sequence[int], shares: Sequence[Fraction], strategy: str) -> list[int]:
    """Examples of each source in an epoch, in the words of `datasets.interleave_datasets`.

    first_exhausted: as many examples as the first source to end allows, so none comes twice.
    all_exhausted: as many as the last source to end needs, so every one comes.
    """
    ends = [size / share for size, share in zip(sizes, shares)]
    total = math.floor(min(ends)) if strategy == "first_exhausted" else math.ceil(max(ends))
    return quotas(total, shares)


class Interleaving:
    """The source of each example of a stream. At any place shares are within one example of exact.

    taken: examples of each source so far. The next is of the source that is furthest behind by
        (taken + 1/2) / share, the rule of Sainte-Lague: counts that can be exact are.
    """

    def __init__(self, shares: Sequence[Fraction], taken: Sequence[int]) -> None:
        self.shares, self.taken = list(shares), list(taken)

    def next(self) -> int:
        behind = [(2 * taken + 1) / share for taken, share in zip(self.taken, self.shares)]
        index = behind.index(min(behind))
        self.taken[index] += 1
        return index


@dataclass(frozen=True, eq=False)
class Mixture:
    """The examples of every epoch, as places in a data set that holds one source after the other.

    sizes: examples of each source. quotas: of them in an epoch. seeds: of their orders.
    used: places of those examples that a data set holds if it does not hold all; ascending.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seeds: tuple[int, ...]
    used: np.ndarray | None = None

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(self.quotas)

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch, source by source, int64. Some may come more than once."""
        starts = np.cumsum((0, *self.sizes[:-1]))
        places = np.concatenate(
            [start + self._draw(index, seed, epoch) for index, start in enumerate(starts)]
        )
        return places if self.used is None else np.searchsorted(self.used, places)

    def examples(self, seed: int, epoch: int) -> np.ndarray:
        """The same in the seeded order in which they are trained on."""
        return np.random.default_rng((seed, epoch)).permutation(self.drawn(seed, epoch))

    def narrowed(self, seed: int, epochs: int) -> Mixture:
        """The same mixture for a data set of those examples alone that the first epochs draw (`used`)."""
        drawn = np.zeros(sum(self.sizes), dtype=bool)
        for epoch in range(epochs):
            drawn[self.drawn(seed, epoch)] = True
        return replace(self, used=np.flatnonzero(drawn))

    def identity(self) -> dict[str, list[int]]:
        """What changes with the examples of any epoch."""
        return {name: list(map(int, getattr(self, name))) for name in ("sizes", "quotas", "seeds")}

    def _draw(self, index: int, seed: int, epoch: int) -> np.ndarray:
        """Examples of one source: the next `quota` of one permutation after the other."""
        size, quota = self.sizes[index], self.quotas[index]
        first, last = epoch * quota, (epoch + 1) * quota
        rounds = range(first // size, -(-last // size))
        whole = [self._permutation(index, seed, number) for number in rounds]
        skipped = first - rounds.start * size
        return np.concatenate(whole)[skipped : skipped + quota]

    def _permutation(self, index: int, seed: int, number: int) -> np.ndarray:
        draw = np.random.default_rng((seed, self.seeds[index], index, number))
        return draw.permutation(self.sizes[index])


def plan(
    sizes: Sequence[int], weights: Sequence[float], seeds: Sequence[int], strategy: str
) -> Mixture:
    """The mixture of sources of these sizes. Raises UserError for a source that an epoch has nothing of."""
    found = epoch_quotas(sizes, shares(weights), strategy)
    if 0 in found:
        index = found.index(0)
        raise UserError(
            f"data.train[{index}].weight={weights[index]} is no example of an epoch, which has "
            f"{sum(found)} with data.stopping_strategy={strategy}; raise the weight, or set "
            "data.stopping_strategy=all_exhausted"
        )
    return Mixture(tuple(sizes), tuple(found), tuple(seeds))
