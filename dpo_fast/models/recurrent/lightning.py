"""MiniMax's lightning attention (arXiv 2501.08313, section 2.2.1) along a row of trees.

Linear attention whose state decays by a constant of each head: S_t = exp(g) S_t-1 + k_t v_t', and a token
gets q_t S_t. transformers computes it inside the layer's forward, in blocks that are counted from the
row's beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.recurrent.segments import CHUNK, by_levels
from dpo_fast.models.recurrent.told import check_whole_row

LAYER = "MiniMaxLightningAttention"


def lightning(
    module: nn.Module, hidden_states: Tensor, *arguments, plan=None, **options
) -> tuple[Tensor, None]:
    """The layer's forward for a row of trees; its own one for calls without a plan.

    hidden_states: [1, N, D].
    """
    if not isinstance(plan, AttentionPlan):
        return module.forward_of_batches(hidden_states, *arguments, **options)
    check_whole_row(plan)
    heads = module.num_attention_heads
    mixed = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (heads, -1))
    query, key, value = mixed.split(module.head_dim, dim=-1)
    decay = (-module.slope_rate).flatten().expand(*query.shape[:3])
    output = by_levels(plan, decayed_attention, query, key, value, decay).flatten(2)
    gate = module.output_gate(hidden_states).sigmoid()
    return module.out_proj(gate * module.norm(output)), None


def decayed_attention(
    rows: tuple[Tensor, ...], state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with decays, chunk by chunk, in fp32. A token of zeros leaves the state as it is.

    rows: query, key, value [B, L, heads, dim] and the logarithms of the decays [B, L, heads].
    state: [B, heads, dim, dim], or None for zeros.
    """
    dtype = rows[0].dtype
    single = torch.promote_types(dtype, torch.float32)
    query, key, value, decay = (each.to(single).transpose(1, 2) for each in rows)
    if state is None:
        state = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for parts in zip(*(each.split(CHUNK, dim=2) for each in (query, key, value, decay))):
        q, k, v, g = parts
        total = g.cumsum(-1)  # decay from the chunk's beginning, the token's own with it
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        inside = (q @ k.transpose(-1, -2) * between) @ v
        outputs.append(inside + (q * total.exp()[..., None]) @ state)
        left = total[..., -1:] - total
        written = (k * left.exp()[..., None]).transpose(-1, -2) @ v
        state = state * total[..., -1].exp()[..., None, None] + written
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), state if final else None
