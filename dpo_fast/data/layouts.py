"""The table of layouts: how the tokens of a micro-batch lie in `input_ids`.

The last token of a sequence predicts nothing, so no layout sends it through the backbone. Sequences that
are the same up to it go through the backbone once.

A new layout is a function that places sequences, a function that counts their tokens, and an entry of the
table. The configuration, `auto`, the samplers, the attention, doctor and the tests read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.packing import Costs
from dpo_fast.data.tree import Spans, distinct, grow

if TYPE_CHECKING:
    from torch import Tensor

# Tokens that different prompts must have in common to share them. A shared beginning costs attention a
# copy of its keys, so the first token of every text, or the header of a template, is not worth it.
LEAST = 16


class Scored(NamedTuple):
    """A sequence as the backbone sees it: int64 ids without the last token, and tokens of the prompt."""

    ids: np.ndarray
    start: int


@dataclass(frozen=True)
class Placement:
    """What a layout decides of a `ScoredBatch`; the fields are described there.

    paths: for each sequence the rows of its tokens, int64, in the flattened hidden states.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: Spans | None
    padding: int
    attended_pairs: int
    paths: list[np.ndarray]


@dataclass(frozen=True)
class Layout:
    """One entry of the table.

    place: lays out sequences, at least one; its second argument fills padding.
    costs: tokens that each example takes in the backbone, if nothing is shared with other examples.
    meaning: what lies where.
    merit: why `auto` chooses it.
    shares_rows: sequences share a row, and attention is told by `spans` which tokens belong
        together. Such a layout needs a model whose attention alone mixes tokens. Otherwise every
        sequence has a row of its own, and attention is told by a mask.
    shares_prompts: sequences continue one copy of what they begin with alike.
    """

    name: str
    place: Callable[[Sequence[Scored], int], Placement]
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
            spans=((1, 0, -1),) if self.shares_rows else None,
            padding=1,
            attended_pairs=0,
            paths=[],
        )


def _place_padded(sequences: Sequence[Scored], pad_id: int) -> Placement:
    """Padding is on the right, so that positions are those of the sequence alone."""
    rows, places = distinct([each.ids for each in sequences])
    lengths = list(map(len, rows))
    width = max(lengths)
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
        mask[row, : len(ids)] = 1
    return Placement(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(rows), -1).contiguous(),
        attention_mask=mask,
        spans=None,
        padding=input_ids.numel() - sum(lengths),
        attended_pairs=sum(length**2 for length in lengths) // 2,
        paths=[np.arange(row * width, row * width + lengths[row]) for row in places],
    )


def _padded_costs(lengths: ExampleLengths) -> Costs:
    return Costs(
        lengths.prompt_P + lengths.longest_P - 1, lengths.counts_P - lengths.sharing.repeated_P
    )


def _place_packed(sequences: Sequence[Scored], pad_id: int) -> Placement:
    return _in_one_row(sequences)


def _packed_costs(lengths: ExampleLengths) -> Costs:
    tokens_P = lengths.counts_P * (lengths.prompt_P - 1) + lengths.sums_P
    sharing = lengths.sharing
    repeated_P = sharing.repeated_P * lengths.prompt_P + sharing.repeated_tokens_P
    return Costs(tokens_P - repeated_P)


def _place_shared_prefix(sequences: Sequence[Scored], pad_id: int) -> Placement:
    """What answers to one prompt have in common is shared, and long beginnings of prompts are."""
    return _in_one_row(sequences, lambda each: each.ids[: min(each.start, LEAST)].tobytes())


def _shared_prefix_costs(lengths: ExampleLengths) -> Costs:
    tokens_P = lengths.prompt_P + lengths.sums_P - lengths.counts_P - lengths.sharing.common_P
    common = lengths.beginning if lengths.beginning >= LEAST else 0
    return Costs(tokens_P - common, common=common)


def _in_one_row(
    sequences: Sequence[Scored], kin: Callable[[Scored], bytes] | None = None
) -> Placement:
    """Distinct sequences along one row. kin: those that share a beginning have the same."""
    alone, places = distinct([each.ids for each in sequences])
    names = None if kin is None else list(dict(zip(places, map(kin, sequences))).values())
    row = grow(alone, names)
    positions = [np.arange(prefix, prefix + own) for own, prefix, _ in row.spans]
    return Placement(
        input_ids=torch.from_numpy(row.ids)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        attention_mask=None,
        spans=row.spans,
        padding=0,
        attended_pairs=sum(own**2 // 2 + own * prefix for own, prefix, _ in row.spans),
        paths=[row.paths[place] for place in places],
    )


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
        meaning="a prompt once, its completions after it, and once what these begin with alike",
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
