"""Causal convolutions along a row of trees.

The convolution runs along the whole row, and is right wherever the tokens before one in the row are those
before it in its sequence. The first tokens of a branch are computed again behind the last tokens of what
it continues, or behind zeros, and put in their places.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.tree import Spans
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.ops.take import take


class Seams(NamedTuple):
    """Where branches begin in the row.

    windows_BL: int64, of every branch whose predecessors are elsewhere width - 1 tokens before it and as
        many of its own; the row's size where there is none. L is 2 (width - 1).
    places: int64, the tokens of the row that are computed again.
    found: int64, as many: their places in the flattened second halves of the windows.
    """

    windows_BL: Tensor
    places: Tensor
    found: Tensor


def seams_of(spans: Spans, device: torch.device, width: int) -> Seams | None:
    """The seams of a row for a convolution over `width` tokens; None if there are none.

    Call it by `plan.once(seams_of, width)`.
    """
    starts = [0, *accumulate(own for own, *_ in spans)]
    nowhere, tail = starts[-1], width - 1
    windows, places, found = [], [], []
    tails: list[np.ndarray] = []  # of every branch the places of its own tokens, with those before
    for place, (own, prefix, parent) in enumerate(spans):
        mine = np.arange(starts[place], starts[place] + own)
        before = np.full(tail, nowhere)
        if parent >= 0:  # of the parent's sequence the last tokens before the fork
            fork = tail + prefix - spans[parent][1]
            before = tails[parent][fork - tail : fork]
        tails.append(np.concatenate([before, mine]))
        if (place == 0 and parent < 0) or not tail:
            continue
        first = mine[:tail]
        filled = np.full(tail, nowhere)
        filled[: len(first)] = first
        found.append(len(windows) * tail + np.arange(len(first)))
        windows.append(np.concatenate([before, filled]))
        places.append(first)
    if not windows:
        return None
    arrays = (np.stack(windows), np.concatenate(places), np.concatenate(found))
    return Seams(*(torch.from_numpy(x).to(device, non_blocking=True) for x in arrays))


def convolve(
    plan: AttentionPlan,
    convolution: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    *arguments,
    **options,
) -> Tensor:
    """A causal depthwise convolution of a row, every sequence by itself.

    convolution(x [B, D, L], weight, *arguments, **options): zeros stand before the first token of each
        of its B rows; gives [B, D, L].
    hidden_states: [1, D, N]. weight: [D, width].

    Gives [1, D, N].
    """
    output = convolution(hidden_states, weight, *arguments, **options)
    seams = plan.once(seams_of, weight.shape[-1])
    if seams is None:
        return output
    # Where nothing is before or behind, the last token stands, and zeros take its place.
    windows_BL, tokens_ND = seams.windows_BL, hidden_states[0].transpose(0, 1)
    size = len(tokens_ND)
    windows_BLD = take(tokens_ND, windows_BL.clamp(max=size - 1).flatten()).unflatten(
        0, windows_BL.shape
    )
    windows_BLD = windows_BLD.masked_fill((windows_BL == size)[..., None], 0)
    again = convolution(windows_BLD.transpose(1, 2).contiguous(), weight, *arguments, **options)
    again = again[:, :, again.shape[-1] // 2 :].transpose(1, 2).flatten(0, 1)
    return output.index_copy(2, seams.places, again.index_select(0, seams.found).T[None])
