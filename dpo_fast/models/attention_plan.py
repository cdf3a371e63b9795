"""Which tokens of one row see which, for every way of computing attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.tree import Spans
from dpo_fast.models.attention_blocks import block_mask
from dpo_fast.models.ulysses import SequenceGroup

Made = TypeVar("Made")


class Segment(NamedTuple):
    """Neighbouring queries with their keys. Attention is causal, aligned at the end of the keys.

    queries: how many.
    prefix: keys before the queries' own, the first ones of all the keys of another segment.
    parent: the place of that segment, which comes before; -1 for none.
    runs: (first, end) of queries that also see all of their run, as tokens of an image do.
    """

    queries: int
    prefix: int
    parent: int
    runs: tuple[tuple[int, int], ...] = ()


class Varlen(NamedTuple):
    """Arguments of a varlen kernel, for all queries or for some.

    rows: the queries; None for all.
    both_ways: whether they see all of their segment's keys, or only those up to themselves.
    keys: index that brings the keys and values of each segment together; None where they already are.
    cu_seq_q, cu_seq_k: int32, where each segment's queries and keys begin, and the end.
    max_q, max_k: of the longest segment.
    """

    keys: Tensor | None
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    rows: Tensor | None = None
    both_ways: bool = False


class AttentionPlan:
    """What attention needs to know of a row of trees.

    A sequence continues the first tokens of another one; what it has of its own is a branch. A token sees
    the tokens before it in its sequence, and no others. So every branch is one segment, which sees the
    keys before its fork and its own, and only the causal triangle is masked away. Tokens of one image may
    see each other both ways.

    One plan serves every layer of a forward pass, and each derived value is made once. It is an
    object rather than a tuple, so torch.compile does not specialise on the lengths.

    spans: of a `ScoredBatch`.
    group: the ranks that each have a slice of the row; None if this one has all of it.
    runs: (first, end) places of tokens in one branch that all see each other, in order.
    runs_in_windows: they do so only where a layer has a sliding window.
    """

    def __init__(
        self,
        spans: Spans,
        device: torch.device,
        group: SequenceGroup | None = None,
        *,
        runs: tuple[tuple[int, int], ...] = (),
        runs_in_windows: bool = False,
    ) -> None:
        self.spans = spans
        self.device = device
        self.group = group
        self.runs = runs
        self.runs_in_windows = runs_in_windows
        self._masks: dict[tuple, Tensor] = {}
        self._block_masks: dict[int | None, object] = {}
        self._chunked: dict[int, AttentionPlan] = {}
        self._made: dict[tuple, object] = {}

    def once(self, make: Callable[..., Made], *options) -> Made:
        """What make(spans, device, *options) gives, made once for all layers."""
        key = (make, *options)
        if key not in self._made:
            self._made[key] = make(self.spans, self.device, *options)
        return self._made[key]

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(prefix + own for own, prefix, _ in self.spans)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """In the order of the row."""
        found, start, runs = [], 0, list(self.runs)
        for span in self.spans:
            end = start + span[0]
            own = tuple((a - start, b - start) for a, b in runs if start <= a < end)
            found.append(Segment(*span, own))
            start = end
        return tuple(found)

    def of_layer(self, window: int | None) -> AttentionPlan:
        """The plan of a layer with this window: without runs, if they are for others only."""
        return self._without_runs if self.runs_in_windows and window is None else self

    @functools.cached_property
    def _without_runs(self) -> AttentionPlan:
        return AttentionPlan(self.spans, self.device, self.group) if self.runs else self

    @functools.cached_property
    def continued(self) -> frozenset[int]:
        """The places of the segments whose keys others begin with."""
        return frozenset(segment.parent for segment in self.segments)

    def mask(self, segment: Segment, window: int | None) -> Tensor:
        """Bool [queries, prefix + queries], true where the query sees the key."""
        size = (segment.queries, segment.prefix, segment.runs, window)
        if size not in self._masks:
            queries, prefix, runs, _ = size
            key = torch.arange(prefix + queries, device=self.device)
            behind = key[prefix:, None] - key
            sees = behind >= 0
            for first, end in runs:
                sees[first:end, prefix + first : prefix + end] = True
            self._masks[size] = sees if window is None else sees & (behind < window)
        return self._masks[size]

    @functools.cached_property
    def varlen(self) -> Varlen:
        """As flash-attention takes it."""
        starts = [0, *accumulate(segment.queries for segment in self.segments)]
        keys = [segment.prefix + segment.queries for segment in self.segments]
        gather = None
        if any(segment.prefix for segment in self.segments):
            paths: list[Tensor] = []
            for segment, start in zip(self.segments, starts):
                own = torch.arange(start, start + segment.queries)
                before = paths[segment.parent][: segment.prefix] if segment.prefix else own[:0]
                paths.append(torch.cat([before, own]))
            gather = torch.cat(paths).to(self.device, non_blocking=True)
        offsets = (
            torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)
            for values in (starts, [0, *accumulate(keys)])
        )
        return Varlen(gather, *offsets, max(s.queries for s in self.segments), max(keys))

    @functools.cached_property
    def varlen_calls(self) -> tuple[Varlen, ...]:
        """The calls of a kernel that together give every query: one, or with runs two.

        A run sees all keys up to its end, what lies between runs is causal. Each of these pieces is a
        sequence to the kernel.
        """
        if not self.runs:
            return (self.varlen,)
        pieces: dict[bool, list[tuple[int, int, Tensor]]] = {True: [], False: []}
        start, paths = 0, []
        for segment in self.segments:
            before = paths[segment.parent][: segment.prefix] if segment.prefix else None
            own = torch.arange(start, start + segment.queries)
            paths.append(own if before is None else torch.cat([before, own]))
            edges = sorted({0, segment.queries, *(edge for run in segment.runs for edge in run)})
            for first, end in zip(edges, edges[1:]):
                keys = paths[-1][: segment.prefix + end]
                pieces[(first, end) in segment.runs].append((start + first, start + end, keys))
            start += segment.queries
        return tuple(self._call(each, both) for both, each in pieces.items() if each)

    def _call(self, pieces: list[tuple[int, int, Tensor]], both_ways: bool) -> Varlen:
        queries = [end - first for first, end, _ in pieces]
        keys = [len(each) for *_, each in pieces]
        tensors = (
            torch.cat([each for *_, each in pieces]),
            torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
            torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
            torch.cat([torch.arange(first, end) for first, end, _ in pieces]),
        )
        gather, cu_q, cu_k, rows = (x.to(self.device, non_blocking=True) for x in tensors)
        return Varlen(gather, cu_q, cu_k, max(queries), max(keys), rows, both_ways)

    @functools.cached_property
    def run_of(self) -> Tensor:
        """For every token the number of its run, -1 outside, int32 [N]."""
        numbers = np.full(sum(own for own, *_ in self.spans), -1, dtype=np.int32)
        for number, (first, end) in enumerate(self.runs):
            numbers[first:end] = number
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    @functools.cached_property
    def ends(self) -> Tensor:
        """For every token the place behind the last one that sees it, int32 [N].

        All that continues a token lies directly behind it. So those that see it are in one piece.
        """
        starts = [0, *accumulate(own for own, *_ in self.spans)]
        ends = np.zeros(starts[-1], dtype=np.int32)
        closed = starts[1:]  # by branch, the end of all that continues it
        for place in reversed(range(len(self.spans))):  # what continues a branch comes after it
            own, prefix, parent = self.spans[place]
            tokens = ends[starts[place] :]
            np.maximum(tokens[:own], starts[place + 1], out=tokens[:own])
            if parent >= 0:
                seen = ends[starts[parent] : starts[parent] + prefix - self.spans[parent][1]]
                np.maximum(seen, closed[place], out=seen)
                closed[parent] = max(closed[parent], closed[place])
        return torch.from_numpy(ends).to(self.device, non_blocking=True)

    @functools.cached_property
    def positions(self) -> Tensor:
        """For every token its place in its sequence, int32 [N]."""
        pieces = [np.arange(prefix, prefix + own, dtype=np.int32) for own, prefix, _ in self.spans]
        return torch.from_numpy(np.concatenate(pieces)).to(self.device, non_blocking=True)

    def chunked(self, size: int) -> AttentionPlan:
        """The plan of a layer in which a token sees only its own one of the chunks of its sequence.

        Chunks have `size` tokens, counted from the beginning of every sequence (Llama 4).
        """
        if self.longest <= size:
            return self
        if size not in self._chunked:
            self._chunked[size] = ChunkedPlan(self, size)
        return self._chunked[size]

    def block_mask(self, window: int | None):
        """FlexAttention's BlockMask of the row."""
        if window not in self._block_masks:
            since = None if window is None else self.positions - (window - 1)
            run_of = self.run_of if self.runs else None
            self._block_masks[window] = block_mask(self.ends, self.positions, since, run_of)
        return self._block_masks[window]


class ChunkedPlan(AttentionPlan):
    """The plan of a row whose sequences are cut into chunks, so that each chunk is a sequence of its own.

    A branch that forks within a chunk continues what that chunk has before the fork.

    whole: the plan of the uncut row.
    """

    def __init__(self, whole: AttentionPlan, size: int) -> None:
        super().__init__(cut_at_chunks(whole.spans, size), whole.device, whole.group)
        self.whole, self.size = whole, size

    def block_mask(self, window: int | None):
        """As the whole row's: what continues a token does not lie directly behind its chunk."""
        if window is not None:
            raise ValueError(f"a layer has chunks or a window; got window={window} with chunks")
        if window not in self._block_masks:
            positions = self.whole.positions
            since = positions // self.size * self.size  # the first one of its chunk
            self._block_masks[window] = block_mask(self.whole.ends, positions, since)
        return self._block_masks[window]


def cut_at_chunks(spans: Spans, size: int) -> Spans:
    """Spans of a row in which every chunk of `size` tokens of a sequence is a sequence of its own."""
    pieces: list[tuple[int, int, int]] = []
    places: list[
        dict[int, int]
    ] = []  # by branch, the piece that has the end of each chunk of its sequence
    for own, prefix, parent in spans:
        behind = prefix % size  # of the prefix, what lies in the chunk of the fork
        found = dict(places[parent]) if prefix else {}
        begin = prefix
        while begin < prefix + own:
            end = min((begin // size + 1) * size, prefix + own)
            chunk = begin // size
            inside = behind if begin == prefix else 0
            pieces.append((end - begin, inside, found[chunk] if inside else -1))
            found[chunk] = len(pieces) - 1
            begin = end
        places.append(found)
    return tuple(pieces)
