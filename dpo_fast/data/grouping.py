"""Examples of one prompt in one micro-batch (train.group_prompts), and what examples really take.

A unit is some examples of one prompt. Units are shuffled and packed as examples are otherwise, so the
epochs stay seeded, and a step's loss is still the mean over its examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dpo_fast.data.kinds import ExampleLengths, Kind
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.lists import Lists, runs
from dpo_fast.data.packing import Costs
from dpo_fast.data.sharing import Sharing, hashes, sharing_of

SLICE = 4_000_000  # tokens that are looked at together
Units = list[np.ndarray]  # places of examples in the data


class Examples(Protocol):
    """What a `Dataset` and a `Chunk` have."""

    kind: Kind
    lengths: ExampleLengths

    def token_lists(self, name: str, indices: np.ndarray) -> Lists: ...


def exact_lengths(examples: Examples, units: Units | None = None) -> ExampleLengths:
    """Lengths of examples, or of units as if each were one example, with what answers have in common.

    It reads the token ids of all their answers.
    """
    if units is None:
        lengths, rows = examples.lengths, np.arange(len(examples.lengths))
        ends = rows + 1
    else:
        lengths = examples.lengths.joined(units)
        rows = np.concatenate([np.zeros(0, np.int64), *units])
        ends = np.cumsum(list(map(len, units)), dtype=np.int64)
    found, first = [], 0
    for last in _slices(lengths.sums_P):
        mine = rows[ends[first - 1] if first else 0 : ends[last - 1]]
        found.append(sharing_of(_answers(examples, mine), lengths.counts_P[first:last]))
        first = last
    sharing = Sharing(*map(np.concatenate, zip(*found))) if found else Sharing.none(0)
    return ExampleLengths(
        lengths.kind,
        lengths.prompt_P,
        lengths.answers_S,
        lengths.counts_P,
        lengths.scored_S,
        sharing,
        beginning_of(examples),
    )


def exact_costs(examples: Examples, layout: str, units: Units | None = None) -> Costs:
    """What examples, or units of them, take in a layout. It reads the token ids of their answers."""
    return LAYOUTS[layout].costs(exact_lengths(examples, units))


def beginning_of(examples: Examples) -> int:
    """Tokens that all prompts begin with: those of one system prompt, or of a template's header."""
    lengths = examples.lengths.prompt_P
    if not len(lengths):
        return 0
    first, count, begin = examples.token_lists("prompt_ids", np.arange(1)), int(lengths.min()), 0
    for end in _slices(lengths):
        lists = examples.token_lists("prompt_ids", np.arange(begin, end))
        places = lists.starts_S[:, None] + np.arange(count)
        same = (lists.values[places] == first.values[:count]).all(axis=0)
        count, begin = int(np.append(same, False).argmin()), end
    return count


def prompts_of(examples: Examples) -> np.ndarray:
    """A number for the prompt of each example, int64 [P], the same for the same prompt alone."""
    found, first = [np.zeros(0, np.uint64)], 0
    for last in _slices(examples.lengths.prompt_P):
        found.append(hashes(examples.token_lists("prompt_ids", np.arange(first, last))))
        first = last
    return np.unique(np.concatenate(found), return_inverse=True)[1]


class SamePrompt:
    """Brings examples of one prompt together.

    prompts_P: as `prompts_of` gives it.
    costs: what units take in the layout of the run, each as if it were one example; of None, what each
        example takes.
    """

    def __init__(self, prompts_P: np.ndarray, costs: Callable[[Units | None], Costs]) -> None:
        self.prompts_P, self.costs = prompts_P, costs
        self._known: dict[
            bytes, tuple[int, int]
        ] = {}  # of units of several examples, as in `Costs`

    @classmethod
    def of(cls, examples: Examples, layout: str) -> SamePrompt:
        """Reads the token ids of all prompts, and those of answers where tokens are counted."""
        return cls(prompts_of(examples), functools.partial(exact_costs, examples, layout))

    def __str__(self) -> str:
        count = len(self.prompts_P)
        prompts = int(self.prompts_P.max(initial=-1)) + 1
        return f"{count} examples of {prompts} prompts, {count / max(prompts, 1):.1f} of each"

    @functools.cached_property
    def alone(self) -> Costs:
        """What each example takes by itself."""
        return self.costs(None)

    def units(self, order: Sequence[int] | np.ndarray) -> Units:
        """The examples of an order in units; copies of an example are in different ones.

        A unit stands where its first example of the data stands in the order, so large units come no
        earlier than small ones. Within it examples are as in the data.
        """
        order = np.asarray(order, dtype=np.int64)
        place = np.arange(len(order))
        by_example = np.lexsort((place, order))
        starts = np.flatnonzero(np.diff(order[by_example], prepend=-1))
        copy = np.empty_like(place)
        copy[by_example] = place - np.repeat(starts, np.diff([*starts, len(order)]))
        by_unit = np.lexsort((order, copy, self.prompts_P[order]))
        own = np.stack([self.prompts_P[order], copy])[:, by_unit]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (own[:, 1:] != own[:, :-1]).any(axis=0)
        firsts = np.flatnonzero(new)
        sizes = np.diff([*firsts, len(order)])
        by_place = np.argsort(by_unit[firsts], kind="stable")
        members = order[by_unit[runs(firsts[by_place], sizes[by_place])]]
        return np.split(members, np.cumsum(sizes[by_place])[:-1]) if len(order) else []

    def order(self, order: Sequence[int] | np.ndarray) -> np.ndarray:
        """The examples of an order, those of one prompt one after the other."""
        return np.concatenate([np.zeros(0, np.int64), *self.units(order)])

    def bins(self, budget: int, order: Sequence[int]) -> tuple[list[list[int]], int]:
        """Micro-batches of at most `budget` tokens, and the tokens of all of them together.

        A unit that is larger than the budget is cut in halves until its pieces fit.

        Raises:
            ValueError: an example that is larger than the budget.
        """
        units = self.units(order)
        costs = self._costs(units)
        while len(large := [unit for unit, size in zip(units, costs.alone_P) if size > budget]):
            if min(map(len, large)) == 1:
                raise ValueError(f"an example takes more than {budget} tokens")
            cut = costs.alone_P > budget
            units = [
                part for unit, both in zip(units, cut) for part in np.array_split(unit, 1 + both)
            ]
            costs = self._costs(units)
        found = costs.bins(budget, range(len(units)))
        used = sum(map(costs.of, found))
        return [np.concatenate([units[each] for each in mine]).tolist() for mine in found], used

    def _costs(self, units: Units) -> Costs:
        """What units take. Those of several examples are looked at once, not in every epoch."""
        new = [unit for unit in units if len(unit) > 1 and unit.tobytes() not in self._known]
        if new:
            found = self.costs(new)
            sequences = found.sizes_P if found.sequences_P is None else found.sequences_P
            for unit, size, count in zip(new, found.sizes_P.tolist(), sequences.tolist()):
                self._known[unit.tobytes()] = size, count
        firsts = np.array([unit[0] for unit in units], dtype=np.int64)
        sizes = self.alone.sizes_P[firsts]
        counts = None if self.alone.sequences_P is None else self.alone.sequences_P[firsts]
        for place, unit in enumerate(units):
            if len(unit) > 1:
                sizes[place], count = self._known[unit.tobytes()]
                if counts is not None:
                    counts[place] = count
        return Costs(sizes, counts, self.alone.common)


def _answers(examples: Examples, rows: np.ndarray) -> Lists:
    """The answers of these examples, one example after the other."""
    first, *others = (examples.token_lists(name, rows) for name in examples.kind.ids[1:])
    for other in others:
        first = first.interleaved(other)
    return first


def _slices(tokens_P: np.ndarray) -> list[int]:
    """Ends of slices of at most `SLICE` tokens, or of one example."""
    ends = np.cumsum(tokens_P)
    cuts: list[int] = []
    while (first := cuts[-1] if cuts else 0) < len(ends):
        limit = (ends[first - 1] if first else 0) + SLICE
        cuts.append(max(int(np.searchsorted(ends, limit, side="right")), first + 1))
    return cuts
