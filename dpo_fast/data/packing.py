"""Whole items into micro-batches of at most so many tokens.

An item is what must stay together: a pair, or a prompt with all its completions. Where the sequences of a
micro-batch lie one after the other, what they take adds up (`pack`); where they are padded, all take as
much as the longest (`group`). Both follow an order that is drawn anew for every epoch, and look ahead
in it by a limited number of items, so that micro-batches differ from epoch to epoch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_fast.data.kinds import RowLengths

AHEAD = 1024  # items that `pack` chooses from; more fill no better
WINDOW = 8192  # items that `group` sorts by length at a time


@dataclass(frozen=True)
class Costs:
    """What each of I items takes in the backbone, in tokens.

    sizes_I: int64, tokens of an item; where sequences are padded, tokens of its longest sequence.
    sequences_I: int64, sequences of an item where they are padded; None where they are not.
    """

    sizes_I: np.ndarray
    sequences_I: np.ndarray | None = None

    @property
    def alone_I(self) -> np.ndarray:
        """Tokens that each item takes in a micro-batch of its own, int64."""
        return self.sizes_I if self.sequences_I is None else self.sizes_I * self.sequences_I

    def of(self, items: Sequence[int]) -> int:
        """Tokens that a micro-batch takes; at least one item."""
        if self.sequences_I is None:
            return int(self.sizes_I[items].sum())
        return int(self.sizes_I[items].max() * self.sequences_I[items].sum())

    def bins(self, budget: int, order: Sequence[int]) -> list[list[int]]:
        """The items of `order` in micro-batches of at most `budget` tokens, each item in one.

        Raises:
            ValueError: an item that is larger than the budget.
        """
        if len(order) and self.alone_I[order].max() > budget:
            raise ValueError(
                f"an item takes {self.alone_I[order].max()} tokens, more than {budget}"
            )
        if self.sequences_I is None:
            return pack(self.sizes_I, budget, order)
        return group(self.sizes_I, self.sequences_I, budget, order)


def row_costs(lengths: RowLengths, layout: str) -> Costs:
    """Costs of rows in a layout.

    The last token of a sequence predicts nothing and does not go through the backbone. Completions of one
    prompt that meet in a micro-batch take less than this.
    """
    prompt_R, counts_R = lengths.prompt_R, lengths.counts_R
    if layout == "padded":
        return Costs(prompt_R + lengths.longest_R - 1, counts_R)
    prompts = {"packed": counts_R, "shared_prefix": 1}[layout]
    return Costs(prompts * prompt_R + lengths.sums_R - counts_R)


def pack(sizes_I: np.ndarray, budget: int, order: Sequence[int]) -> list[list[int]]:
    """Micro-batches for items whose sizes add up.

    Each takes the next items of the order until one does not fit, and then, again and again, the largest
    of those ahead that does. So the bulk of a micro-batch is a random sample, with about as many items as
    any other, and only its end is chosen. (Taking the largest first would fill no better, and give
    micro-batches of few long items and others of many short ones.)
    """
    count = len(order)
    sizes = sizes_I[order].tolist()  # from here on an item is its place in the order
    key = [size * count + item for item, size in enumerate(sizes)]  # sorts by size
    ahead, coming = sorted(key[:AHEAD]), iter(key[AHEAD:])
    taken = bytearray(count)
    bins: list[list[int]] = []
    room = 0

    def take(place: int) -> int:
        """Move an item from those ahead to the last micro-batch; returns its size."""
        size, item = divmod(ahead.pop(place), count)
        taken[item] = True
        bins[-1].append(order[item])
        if (following := next(coming, None)) is not None:
            insort(ahead, following)
        return size

    for item in range(count):
        if not taken[item] and sizes[item] > room:
            while place := bisect_right(ahead, room * count + count - 1):
                room -= take(place - 1)
        if not taken[item]:  # it may have been the best fit just now
            if sizes[item] > room:
                bins.append([])
                room = budget
            room -= take(bisect_left(ahead, key[item]))
    return bins


def group(
    sizes_I: np.ndarray, sequences_I: np.ndarray, budget: int, order: Sequence[int]
) -> list[list[int]]:
    """Micro-batches for items that are padded to the longest of them.

    Within a window of the order, the longest items that are left go together, as many as fit: where items
    have as many sequences each, no other choice needs fewer micro-batches. The shortest, which do not
    fill one, go on to the next window.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for start in range(0, len(order), WINDOW):
        items = np.array([*left, *order[start : start + WINDOW]])
        items = items[np.argsort(-sizes_I[items], kind="stable")].tolist()
        groups = _cut(items, sizes_I, sequences_I, budget)
        left = groups.pop()
        bins += groups
    return [*bins, left] if left else bins


def _cut(
    items: list[int], sizes_I: np.ndarray, sequences_I: np.ndarray, budget: int
) -> list[list[int]]:
    """Items from the longest to the shortest, cut where the next would not fit."""
    groups: list[list[int]] = []
    room = 0  # sequences that the current group has room for
    for item in items:
        sequences = int(sequences_I[item])
        if sequences > room:
            groups.append([])
            room = budget // int(sizes_I[item])
        groups[-1].append(item)
        room -= sequences
    return groups
