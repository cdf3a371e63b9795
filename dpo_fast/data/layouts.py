"""The table of layouts: how the tokens of a micro-batch lie in `input_ids`.

The last token of a sequence predicts nothing, so no layout sends it through the backbone.

A new layout is a function that places trees, a function that counts their tokens, and an entry of the
table. The configuration, `auto`, the samplers, the attention, doctor and the tests read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.packing import Costs

if TYPE_CHECKING:
    from torch import Tensor

Trees = Sequence[tuple[list[int], list[list[int]]]]  # prompts, each with its completions


@dataclass(frozen=True)
class Placement:
    """What a layout decides of a `ScoredBatch`; the fields are described there."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: tuple[tuple[int, ...], ...] | None
    rows_T: Tensor
    padding: int
    attended_pairs: int


@dataclass(frozen=True)
class Layout:
    """One entry of the table.

    place: lays out trees of token ids, at least one; its second argument fills padding.
    costs: tokens that each example takes in the backbone, if nothing but its own prompt is shared.
    meaning: what lies where.
    merit: why `auto` chooses it.
    shares_rows: sequences share a row, and attention is told by `spans` which tokens belong
        together. Such a layout needs a model whose attention alone mixes tokens. Otherwise every
        sequence has a row of its own, and attention is told by a mask.
    shares_prompts: all completions of a prompt continue one copy of it.
    """

    name: str
    place: Callable[[Trees, int], Placement]
    costs: Callable[[ExampleLengths], Costs]
    meaning: str
    merit: str
    shares_rows: bool
    shares_prompts: bool

    def nothing(self, pad_id: int) -> Placement:
        """One padding token: a rank without examples still takes part in every collective."""
        return Placement(
            input_ids=torch.full((1, 1), pad_id),
            position_ids=torch.zeros(1, 1, dtype=torch.int64),
            attention_mask=None if self.shares_rows else torch.ones(1, 1, dtype=torch.int64),
            spans=((1,),) if self.shares_rows else None,
            rows_T=torch.zeros(0, dtype=torch.int64),
            padding=1,
            attended_pairs=0,
        )


def _place_padded(trees: Trees, pad_id: int) -> Placement:
    """Padding is on the right, so that positions are those of the sequence alone."""
    sequences = [[*prompt, *c[:-1]] for prompt, completions in trees for c in completions]
    starts = [len(prompt) for prompt, completions in trees for _ in completions]
    lengths = [len(sequence) for sequence in sequences]
    width = max(lengths)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    scored = zip(range(0, width * len(sequences), width), starts, lengths)
    rows = [np.arange(row + start - 1, row + length) for row, start, length in scored]
    return Placement(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(sequences), -1).contiguous(),
        attention_mask=mask,
        spans=None,
        rows_T=torch.from_numpy(np.concatenate(rows)),
        padding=input_ids.numel() - sum(lengths),
        attended_pairs=sum(length**2 for length in lengths) // 2,
    )


def _padded_costs(lengths: ExampleLengths) -> Costs:
    return Costs(lengths.prompt_P + lengths.longest_P - 1, lengths.counts_P)


def _place_packed(trees: Trees, pad_id: int) -> Placement:
    """As trees of one completion each, so nothing is shared."""
    alone = [(prompt, [completion]) for prompt, completions in trees for completion in completions]
    return _place_shared_prefix(alone, pad_id)


def _packed_costs(lengths: ExampleLengths) -> Costs:
    return Costs(lengths.counts_P * (lengths.prompt_P - 1) + lengths.sums_P)


def _place_shared_prefix(trees: Trees, pad_id: int) -> Placement:
    """All completions continue the prompt's last position; its row predicts their first tokens."""
    ids, positions, spans, rows, offset = [], [], [], [], 0
    for prompt, completions in trees:
        start = len(prompt)
        last = offset + start - 1
        ids.append(prompt)
        positions.append(np.arange(start))
        offset += start
        for completion in completions:
            size = len(completion) - 1
            ids.append(completion[:-1])
            positions.append(np.arange(start, start + size))
            rows.append(np.concatenate([[last], np.arange(offset, offset + size)]))
            offset += size
        spans.append((start, *(len(completion) - 1 for completion in completions)))
    return Placement(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        attention_mask=None,
        spans=tuple(spans),
        rows_T=torch.from_numpy(np.concatenate(rows)),
        padding=0,
        attended_pairs=sum(map(_attended_pairs, spans)),
    )


def _shared_prefix_costs(lengths: ExampleLengths) -> Costs:
    return Costs(lengths.prompt_P + lengths.sums_P - lengths.counts_P)


def _attended_pairs(span: tuple[int, ...]) -> int:
    """Half a square for the trunk and for each branch, and every branch sees the whole trunk."""
    trunk, *branches = span
    return (trunk**2 + sum(branch**2 for branch in branches)) // 2 + trunk * sum(branches)


_TABLE = (
    Layout(
        "padded",
        _place_padded,
        _padded_costs,
        meaning="a row for every sequence, padded to the longest",
        merit="attention needs no more than a mask",
        shares_rows=False,
        shares_prompts=False,
    ),
    Layout(
        "packed",
        _place_packed,
        _packed_costs,
        meaning="the same sequences one after the other in one row",
        merit="no padding goes through the backbone",
        shares_rows=True,
        shares_prompts=False,
    ),
    Layout(
        "shared_prefix",
        _place_shared_prefix,
        _shared_prefix_costs,
        meaning="the prompt once, its completions after it",
        merit="no token goes through the backbone twice",
        shares_rows=True,
        shares_prompts=True,
    ),
)
# From the one that every model allows to the one with the fewest tokens. `auto` takes the last that
# the model allows.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _TABLE}


def layouts_with(*, shares_rows: bool) -> str:
    """Names of the layouts that share rows, or of those that do not: `packed or shared_prefix`."""
    return " or ".join(name for name, each in LAYOUTS.items() if each.shares_rows == shares_rows)
