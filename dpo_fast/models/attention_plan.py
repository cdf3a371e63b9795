"""Which tokens of one row see which, for every way of computing attention."""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Neighbouring queries with their keys. Attention is causal, aligned at the end of the keys.

    queries: how many.
    prefix: keys of a trunk elsewhere in the row, which come before the queries' own keys.
    trunk: place in the row at which that trunk begins.
    """

    queries: int
    prefix: int
    trunk: int


class Varlen(NamedTuple):
    """Arguments of a varlen kernel.

    keys: index that brings the keys and values of each segment together; None where they already are.
    cu_seq_q, cu_seq_k: int32, where each segment's queries and keys begin, and the end.
    max_q, max_k: of the longest segment.
    """

    keys: Tensor | None
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


class AttentionPlan:
    """What attention needs to know of a row of trees, each a trunk with branches that continue it.

    A token sees the tokens before it in its own branch and its trunk, and no others. The first
    branch and the trunk are one causal segment. Every other branch is a segment that sees the
    trunk's keys and its own. So only the causal triangle is masked away.

    One plan serves every layer of a forward pass, and each derived value is made once. It is an
    object rather than a tuple, so torch.compile does not specialise on the lengths.

    spans: (trunk, branch, ...) lengths along the row; branches may be empty.
    """

    def __init__(self, spans: tuple[tuple[int, ...], ...], device: torch.device) -> None:
        self.spans = spans
        self.device = device
        self._masks: dict[tuple, Tensor] = {}
        self._block_masks: dict[int | None, object] = {}

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(trunk + max(branches, default=0) for trunk, *branches in self.spans)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """In the order of the row. Empty branches have none."""
        segments, start = [], 0
        for trunk, *branches in self.spans:
            first, *others = branches or [0]
            segments.append(Segment(trunk + first, 0, start))
            segments += [Segment(size, trunk, start) for size in others if size]
            start += trunk + sum(branches)
        return tuple(segments)

    def mask(self, segment: Segment, window: int | None) -> Tensor:
        """Bool [queries, prefix + queries], true where the query sees the key."""
        size = (segment.queries, segment.prefix, window)
        if size not in self._masks:
            queries, prefix, _ = size
            key = torch.arange(prefix + queries, device=self.device)
            behind = key[prefix:, None] - key
            sees = behind >= 0
            self._masks[size] = sees if window is None else sees & (behind < window)
        return self._masks[size]

    @functools.cached_property
    def varlen(self) -> Varlen:
        """As flash-attention takes it."""
        starts = [0, *accumulate(segment.queries for segment in self.segments)]
        keys = [segment.prefix + segment.queries for segment in self.segments]
        gather = None
        if any(segment.prefix for segment in self.segments):
            pieces = [
                torch.arange(begin, begin + size)
                for segment, start in zip(self.segments, starts)
                for begin, size in ((segment.trunk, segment.prefix), (start, segment.queries))
            ]
            gather = torch.cat(pieces).to(self.device, non_blocking=True)
        offsets = (
            torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)
            for values in (starts, [0, *accumulate(keys)])
        )
        return Varlen(gather, *offsets, max(s.queries for s in self.segments), max(keys))

    @functools.cached_property
    def tags(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every token its tree, its branch (0 the trunk) and its position, int32 [N] each."""
        values = [
            (tree, branch, position)
            for tree, (trunk, *branches) in enumerate(self.spans)
            for branch, begin, size in [(0, 0, trunk)]
            + [(b, trunk, n) for b, n in enumerate(branches, 1)]
            for position in range(begin, begin + size)
        ]
        columns = torch.tensor(values, dtype=torch.int32).t().contiguous().to(self.device)
        return tuple(columns.unbind(0))

    def block_mask(self, window: int | None):
        """FlexAttention's BlockMask of the row."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            tree, branch, position = self.tags
            size = len(tree)

            def sees(batch, head, query, key):
                behind = position[query] - position[key]
                mine = (branch[key] == 0) | (branch[key] == branch[query])
                allowed = (tree[key] == tree[query]) & mine & (behind >= 0)
                return allowed if window is None else allowed & (behind < window)

            self._block_masks[window] = create_block_mask(
                sees, None, None, size, size, device=self.device
            )
        return self._block_masks[window]
