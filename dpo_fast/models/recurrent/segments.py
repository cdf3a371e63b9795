"""A row of trees as levels of segments, for layers that carry a state along the tokens.

A branch is cut wherever another one forks from it. So every segment begins either a sequence or where
its parent ends, with the state that its parent leaves. A level has all segments at one depth: their
parents are all in the level before, so a level is one call of a layer's function.

How a layer with a state is served (`by_levels`):

    def compute(rows, state, final):       # rows: of each tensor given [B, L, ...]; state [B, ...] or None
        output, state = scan(*rows, initial_state=state, output_final_state=final)
        return output, state               # output [B, L, ...]; state [B, ...]

    output = by_levels(plan, compute, x, dt, b, c)       # each [1, N, ...]; gives [1, N, ...]

Shorter segments of a batch are filled up with zeros at the end, in every tensor given. The function must
pass its state over zeros unchanged: then the final state is that of the segment's own end. That holds for
decays in log space (exp(0) = 1) and what is written with a factor of zero: g, beta, dt. A tensor in which
zero is not neutral has to be made so in `compute`.

A kernel that takes segments of unequal length side by side gets them by `by_flat_levels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.tree import Spans
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.ops.take import take

# Batches of one level have segments of 1 to 64 tokens, of 65 to 128, of 129 to 256, and so on.
CHUNK = 64


class Cut(NamedTuple):
    """A segment: its place in the row, tokens of its own, and the number of its parent or -1."""

    start: int
    tokens: int
    parent: int


class Batch(NamedTuple):
    """Segments of one level that are computed together.

    places_BL: int64, the token of the row; the segment's first one where it is filled up.
    filling_BL: bool, true where it is filled up; None if nothing is.
    """

    places_BL: Tensor
    filling_BL: Tensor | None

    def of(self, row: Tensor) -> Tensor:
        """[1, N, ...] as [B, L, ...], zeros where segments are filled up."""
        rows = row[0].index_select(0, self.places_BL.flatten())
        rows = rows.unflatten(0, self.places_BL.shape)
        if self.filling_BL is None:
            return rows
        return rows.masked_fill(
            self.filling_BL.view(*self.filling_BL.shape, *[1] * (row.dim() - 2)), 0
        )


class Level(NamedTuple):
    """Segments at one depth.

    batches: their segments stand one batch after the other.
    parents: int64, for every segment its parent's number in the level before; None at the first level.
    flat: int64 [n], the tokens of the row that all segments have, one segment after the other.
    offsets: int64 [segments + 1], where each begins in that, and the end.
    last: whether no segment continues one of these, so that nobody asks for their final states.
    """

    batches: tuple[Batch, ...]
    parents: Tensor | None
    flat: Tensor
    offsets: Tensor
    last: bool


class Levels(NamedTuple):
    """A row by levels.

    back: int64 [N], for every token of the row its place in the outputs of all batches, flattened.
    back_flat: the same for the outputs of all levels, flat.
    """

    levels: tuple[Level, ...]
    back: Tensor
    back_flat: Tensor


def cut(spans: Spans) -> list[Cut]:
    """The segments of a row in its order; parents come before those that continue them.

    A branch of `own` tokens after a prefix of p is cut at every prefix > p with which others continue it.
    """
    forks: list[set[int]] = [set() for _ in spans]
    for _, prefix, parent in spans:
        if parent >= 0:
            forks[parent].add(prefix)
    segments: list[Cut] = []
    ends: list[
        dict[int, int]
    ] = []  # by branch, the segment that ends after so many tokens of a sequence
    start = 0
    for place, (own, prefix, parent) in enumerate(spans):
        before = ends[parent][prefix] if parent >= 0 else -1
        inside = sorted(fork for fork in forks[place] if prefix < fork < prefix + own)
        mine: dict[int, int] = {}
        for begin, end in zip([prefix, *inside], [*inside, prefix + own]):
            segments.append(Cut(start + begin - prefix, end - begin, before))
            before = mine[end] = len(segments) - 1
        ends.append(mine)
        start += own
    return segments


def levels_of(spans: Spans, device: torch.device) -> Levels:
    """The levels of a row, with their indices on a device. Call it by `plan.once(levels_of)`."""
    segments = cut(spans)
    depths: list[int] = []
    for segment in segments:
        depths.append(0 if segment.parent < 0 else depths[segment.parent] + 1)
    size = sum(segment.tokens for segment in segments)
    back, back_flat = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    numbers: dict[int, int] = {}  # of the segments of the level before
    levels, cells, tokens = [], 0, 0
    for depth in range(max(depths) + 1):
        groups = _by_length([i for i, each in enumerate(depths) if each == depth], segments)
        order = [i for group in groups for i in group]
        batches = []
        for group in groups:
            batch, inside = _batch([segments[i] for i in group])
            back[batch[~inside]] = cells + np.flatnonzero(~inside)
            cells += batch.size
            batches.append(Batch(_on(batch, device), _on(inside, device) if inside.any() else None))
        flat = np.concatenate([_tokens(segments[i]) for i in order])
        back_flat[flat] = tokens + np.arange(len(flat))
        tokens += len(flat)
        parents = [numbers.get(segments[i].parent, -1) for i in order]
        numbers = {i: number for number, i in enumerate(order)}
        levels.append(
            Level(
                tuple(batches),
                _on(np.array(parents, dtype=np.int64), device) if depth else None,
                _on(flat, device),
                _on(np.cumsum([0, *(segments[i].tokens for i in order)]).astype(np.int64), device),
                last=depth == max(depths),
            )
        )
    return Levels(tuple(levels), _on(back, device), _on(back_flat, device))


def _by_length(numbers: list[int], segments: Sequence[Cut]) -> list[list[int]]:
    """Segments of one level, those together whose lengths in chunks have the same power of two."""
    groups: dict[int, list[int]] = {}
    for number in numbers:
        chunks = -(-segments[number].tokens // CHUNK)
        groups.setdefault((chunks - 1).bit_length(), []).append(number)
    return [groups[key] for key in sorted(groups)]


def _batch(segments: Sequence[Cut]) -> tuple[np.ndarray, np.ndarray]:
    """Places [B, L], and whether they only fill a segment up."""
    starts = np.array([each.start for each in segments])[:, None]
    lengths = np.array([each.tokens for each in segments])[:, None]
    steps = np.arange(lengths.max())[None]
    return np.where(steps < lengths, starts + steps, starts), steps >= lengths


def _tokens(segment: Cut) -> np.ndarray:
    return np.arange(segment.start, segment.start + segment.tokens)


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


Compute = Callable[[tuple[Tensor, ...], Tensor | None, bool], tuple[Tensor, Tensor | None]]
Flat = Callable[[tuple[Tensor, ...], Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def by_levels(plan: AttentionPlan, compute: Compute, *row: Tensor) -> Tensor:
    """A function with a state over a row of trees, [1, N, ...], level by level.

    Gradients flow through states into what the segments continue.

    compute(rows, state, final): as the module says. `state` is None at the first level: all begin anew.
        `final` says whether the final states are asked for.
    row: tensors [1, N, ...].
    """
    levels = plan.once(levels_of)
    outputs, finals = [], None
    for level in levels.levels:
        states = None if level.parents is None else take(finals, level.parents)
        begin, ends = 0, []
        for batch in level.batches:
            size = len(batch.places_BL)
            state = None if states is None else states[begin : begin + size]
            output, end = compute(tuple(map(batch.of, row)), state, not level.last)
            outputs.append(output.flatten(0, 1))
            ends.append(end)
            begin += size
        finals = None if level.last else torch.cat(ends)
    return torch.cat(outputs).index_select(0, levels.back)[None]


def by_flat_levels(plan: AttentionPlan, compute: Flat, *row: Tensor) -> Tensor:
    """As `by_levels`, for kernels that take segments of unequal length one after the other.

    compute(rows, offsets, state, final): rows [1, n, ...], offsets int64 [segments + 1]; gives the
        output [1, n, ...] and the states [segments, ...].
    """
    levels = plan.once(levels_of)
    outputs, finals = [], None
    for level in levels.levels:
        states = None if level.parents is None else take(finals, level.parents)
        rows = tuple(values.index_select(1, level.flat) for values in row)
        output, finals = compute(rows, level.offsets, states, not level.last)
        outputs.append(output[0])
    return torch.cat(outputs).index_select(0, levels.back_flat)[None]
