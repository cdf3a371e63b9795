"""A causal layer of any kind over a row of trees: every sequence gets a row of its own inside the layer.

What a trunk is to several branches the layer computes for each of them, as it would in a padded batch. All
round it stays in the one row. So it serves layers whose state cannot be handed from trunk to branch:
Mamba-1's kernels start from nothing, and RecurrentGemma's begin anew at position 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import MethodType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpo_fast.data.tree import Spans
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.ops.take import take

# By the name of a layer's class that of the module round it, where that does not hand keywords on.
LAYERS: dict[str, str | None] = {
    "ZambaMambaMixer": None,
    "JambaMambaMixer": "JambaMambaDecoderLayer",
    "RecurrentGemmaRecurrentBlock": None,
    "ZayaCCAProjection": "ZayaAttention",
}


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
    return Sequences(torch.from_numpy(tokens).to(device), torch.from_numpy(places).to(device))


@torch.compiler.disable
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


def _of_tokens(value, *shape: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == shape


def unfoldable(module: nn.Module) -> bool:
    """Whether this is a layer that is served sequence by sequence."""
    return type(module).__name__ in LAYERS


def serve_unfolded(model: nn.Module) -> None:
    """Have the layers of a model that `LAYERS` has compute rows of trees, in place."""
    tellers = {LAYERS[type(module).__name__] for module in model.modules() if unfoldable(module)}
    for module in model.modules():
        if type(module).__name__ in tellers:
            replace_forward(module, _telling)
        if unfoldable(module):
            replace_forward(module, _unfolded)


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Give a module a forward round its own, a method that copies of the module have, too."""
    if not hasattr(module, "forward_of_batches"):
        module.forward_of_batches = module.forward
        module.forward = MethodType(forward, module)


def _unfolded(module: nn.Module, *arguments, **options):
    """A layer's forward. The plan is among its arguments, where it has a place for one or for a mask."""
    plans = [each for each in (*arguments, *options.values()) if isinstance(each, AttentionPlan)]
    options.pop("plan", None)
    if not plans:
        return module.forward_of_batches(*arguments, **options)
    arguments, options = (
        _without_plans(arguments),
        dict(zip(options, _without_plans(options.values()))),
    )
    return over_sequences(module.forward_of_batches, plans[0], *arguments, **options)


def _without_plans(values) -> list:
    return [None if isinstance(each, AttentionPlan) else each for each in values]


def _telling(module: nn.Module, *arguments, attention_mask=None, **options):
    """The forward of a module that hands masks on, but no keywords: the plan goes in the mask's place.

    Rows of trees have no padding, so that the mask is None. As an argument it is there again when the
    module is recomputed.
    """
    plan = options.get("plan")
    if isinstance(plan, AttentionPlan):
        of_many = isinstance(attention_mask, dict)  # of ZAYA's attention
        attention_mask = {**attention_mask, "conv": plan} if of_many else plan
    return module.forward_of_batches(*arguments, attention_mask=attention_mask, **options)
