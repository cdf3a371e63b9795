"""What a layer's attention does beyond its call: windows and chunks that its mask alone has, temperatures.

Where sequences share a row there is no mask. So what a model puts into a mask and nowhere else has to be
had from its configuration, by transformers' rules (`masking_utils`). `attention_trial` checks that these
are the masks that the model makes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.models.attention_plan import AttentionPlan


class Local(NamedTuple):
    """How far attention looks. window: so many last tokens. chunk: the own one of chunks of so many."""

    window: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        if self.chunk is not None:
            return f"chunks of {self.chunk} tokens"
        return "no window" if self.window is None else f"a window of {self.window} tokens"


def local_of(module: nn.Module) -> Local:
    """How far a layer looks by its mask, if its call does not tell of a window."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return Local(window=window)
    place = getattr(module, "layer_idx", None)
    kind = kinds[place] if isinstance(place, int) and place < len(kinds) else None
    if kind == "sliding_attention":
        return Local(window=window)
    return Local(chunk=config.attention_chunk_size if kind == "chunked_attention" else None)


def with_temperature(module: nn.Module, query: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries with the temperature of their place in their sequence, for that of their place in the row.

    Llama 4's layers without rotary embeddings multiply queries by a factor that grows with the place
    (arXiv 2501.19399), and count places along the row. The factor is 1 up to `floor_scale` tokens.

    query: [1, heads, N, dim]; with a group, this rank's slice of the row.
    """
    tuned = getattr(module, "attn_temperature_tuning", False)
    if not tuned or getattr(module, "use_rope", True):
        return query
    right = plan.positions
    if plan.group is not None:
        right = plan.group.slice_of(right)
    wrong = torch.arange(query.shape[2], device=query.device)
    ratio = _factor(module, right) / _factor(module, wrong)
    return (query * ratio[None, None, :, None]).to(query.dtype)


def _factor(module: nn.Module, places: Tensor) -> Tensor:
    return torch.log1p(torch.floor((places + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
