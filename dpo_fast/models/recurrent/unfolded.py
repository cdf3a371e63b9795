"""A causal layer of any kind over a row of trees: every sequence gets a row of its own inside the layer.

What a trunk is to several branches the layer computes for each of them, as it would in a padded batch. All
round it stays in the one row. So it serves what cannot go on from a state: RecurrentGemma's layers begin
anew at position 0, and the kernels of Mamba-1's scan start from nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpo_fast.data.tree import Spans
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.ops.take import take


class Sequences(NamedTuple):
    """The sequences of a row, each whole.

    tokens: int64 [S, L], the place in the row of every token. Behind the end of a sequence 0, of which
        nothing is read.
    places: int64 [T], where in the flattened [S * L] every token of the row stands, once.
    """

    tokens: Tensor
    places: Tensor


def sequences_of(spans: Spans, device: torch.device) -> Sequences:
    """The sequences of a row of trees, without those that lie in another one from start to end.

    Call it by `plan.once(sequences_of)`.
    """
    starts = [0, *accumulate(own for own, *_ in spans)]
    paths: list[np.ndarray] = []
    last = {}  # by branch, the furthest fork of what goes on from it
    for (own, prefix, parent), start in zip(spans, starts):
        before = paths[parent][:prefix] if prefix else np.zeros(0, np.int64)
        paths.append(np.concatenate([before, np.arange(start, start + own)]))
        if prefix:
            last[parent] = max(last.get(parent, 0), prefix)
    kept = [path for place, path in enumerate(paths) if last.get(place, 0) < len(path)]
    tokens = np.zeros((len(kept), max(map(len, kept))), np.int64)
    places = np.zeros(starts[-1], np.int64)
    for row, path in enumerate(kept):
        tokens[row, : len(path)] = path
        places[path] = row * tokens.shape[1] + np.arange(len(path))
    index = (torch.from_numpy(x).to(device, non_blocking=True) for x in (tokens, places))
    return Sequences(*index)


def over_sequences(layer: Callable, plan: AttentionPlan, *arguments, **options):
    """What a causal layer gives, for a row of trees, as if every sequence were alone.

    layer: of batches [S, L, ...], the first two dimensions of all that it takes and gives of tokens.
    arguments, options: for it, those of tokens as [1, T, ...]. Masks have to be None.
    """
    sequences = plan.once(sequences_of)
    size = len(sequences.places)

    def unfold(value):
        if not _of_tokens(value, 1, size):
            return value
        return take(value[0], sequences.tokens.flatten()).unflatten(0, sequences.tokens.shape)

    def fold(value):
        if not _of_tokens(value, *sequences.tokens.shape):
            return value
        return take(value.flatten(0, 1), sequences.places)[None]

    return tree_map(fold, layer(*tree_map(unfold, arguments), **tree_map(unfold, options)))


def selective_scan(
    plan: AttentionPlan,
    scan: Callable[..., Tensor],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    return_last_state: bool = False,
    **options,
) -> Tensor:
    """Mamba-1's scan of a row (Gu and Dao 2023, arXiv:2312.00752, section 3), every sequence by itself.

    mamba-ssm's kernel takes no state to begin with, and gives no gradient of the one that it ends with.

    scan: a function of transformers, with the arguments of mamba-ssm's `selective_scan_fn`.
    hidden_states, dt, z: [1, dim, T]. A: [dim, state]. B, C: [1, state, T]. D: [dim].

    Gives [1, dim, T].
    """
    if return_last_state:
        raise ValueError("a row of trees leaves no state")

    def batch(*rows):
        x, dt, b, c, *gate = (each.transpose(1, 2).contiguous() for each in rows)
        output = scan(x, dt, A, b, c, D=D, z=gate[0] if gate else None, **options)
        return output.transpose(1, 2)

    rows = (hidden_states, dt, B, C) if z is None else (hidden_states, dt, B, C, z)
    output = over_sequences(batch, plan, *(each.transpose(1, 2) for each in rows))
    return output.transpose(1, 2)


def _of_tokens(value, *shape: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == shape
