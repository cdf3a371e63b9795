"""Whole examples into micro-batches of at most so many tokens.

Where the sequences of a micro-batch lie one after the other, their tokens add up (`best_fit`).
Where they are padded, each takes as much as the longest (`by_length`). Both follow an order that is
drawn anew for every epoch and look ahead in it by a limited number of examples, so micro-batches
differ from epoch to epoch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AHEAD = 1024  # examples that `best_fit` chooses from; more fill no better
WINDOW = 8192  # examples that `by_length` sorts at a time


@dataclass(frozen=True)
class Costs:
    """Tokens that each of P examples takes in the backbone.

    sizes_P: int64, tokens of an example; where sequences are padded, of its longest sequence.
    sequences_P: int64, sequences of an example where they are padded; None where tokens add up.
    common: tokens that all examples begin with, which each micro-batch takes once; not in `sizes_P`.
    """

    sizes_P: np.ndarray
    sequences_P: np.ndarray | None = None
    common: int = 0

    @property
    def alone_P(self) -> np.ndarray:
        """Tokens that each example takes in a micro-batch of its own, int64."""
        if self.sequences_P is None:
            return self.sizes_P + self.common
        return self.sizes_P * self.sequences_P

    def of(self, examples: Sequence[int]) -> int:
        """Tokens that a micro-batch of these examples, at least one, takes."""
        if self.sequences_P is None:
            return int(self.sizes_P[examples].sum()) + self.common
        return int(self.sizes_P[examples].max() * self.sequences_P[examples].sum())

    def bins(self, budget: int, order: Sequence[int]) -> list[list[int]]:
        """The examples of `order` in micro-batches of at most `budget` tokens, each example in one.

        Raises:
            ValueError: an example that is larger than the budget.
        """
        if len(order) and self.alone_P[order].max() > budget:
            raise ValueError(
                f"an example takes {self.alone_P[order].max()} tokens, more than {budget}"
            )
        if self.sequences_P is None:
            return best_fit(self.sizes_P, budget - self.common, order)
        return by_length(self.sizes_P, self.sequences_P, budget, order)


def best_fit(sizes_P: np.ndarray, budget: int, order: Sequence[int]) -> list[list[int]]:
    """Micro-batches of examples whose tokens add up.

    A micro-batch takes the next examples of the order until one does not fit. Then it takes the
    largest of those ahead that does, again and again. So its bulk is a random sample, with about as
    many examples as any other, and only its end is chosen. Taking the largest first would fill no
    better, and would put few long examples into some micro-batches and many short ones into others.
    """
    count = len(order)
    sizes = sizes_P[order].tolist()  # from here on an example is its place in the order
    key = [size * count + place for place, size in enumerate(sizes)]  # sorts by size
    ahead, coming = sorted(key[:AHEAD]), iter(key[AHEAD:])
    taken = bytearray(count)
    bins: list[list[int]] = []
    room = 0

    def take(index: int) -> int:
        """Move an example from those ahead to the last micro-batch; returns its size."""
        size, place = divmod(ahead.pop(index), count)
        taken[place] = True
        bins[-1].append(order[place])
        if (following := next(coming, None)) is not None:
            insort(ahead, following)
        return size

    for place in range(count):
        if not taken[place] and sizes[place] > room:
            while index := bisect_right(ahead, room * count + count - 1):
                room -= take(index - 1)
        if not taken[place]:  # it may have been the best fit just now
            if sizes[place] > room:
                bins.append([])
                room = budget
            room -= take(bisect_left(ahead, key[place]))
    return bins


def by_length(
    sizes_P: np.ndarray, sequences_P: np.ndarray, budget: int, order: Sequence[int]
) -> list[list[int]]:
    """Micro-batches of examples that are padded to the longest sequence.

    Within a window of the order the longest examples that are left go together, as many as fit.
    Where examples have as many sequences each, no other choice needs fewer micro-batches. The
    shortest, which do not fill one, go on to the next window.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for start in range(0, len(order), WINDOW):
        window = np.array([*left, *order[start : start + WINDOW]])
        window = window[np.argsort(-sizes_P[window], kind="stable")].tolist()
        cut = _cut(window, sizes_P, sequences_P, budget)
        left = cut.pop()
        bins += cut
    return [*bins, left] if left else bins


def _cut(
    examples: list[int], sizes_P: np.ndarray, sequences_P: np.ndarray, budget: int
) -> list[list[int]]:
    """Examples from the longest to the shortest, cut where the next would not fit."""
    bins: list[list[int]] = []
    room = 0  # sequences that the last micro-batch has room for
    for example in examples:
        sequences = int(sequences_P[example])
        if sequences > room:
            bins.append([])
            room = budget // int(sizes_P[example])
        bins[-1].append(example)
        room -= sequences
    return bins
