"""FlexAttention's mask of a row, by blocks of tokens: who sees whom is never written out for all tokens.

PyTorch's `create_block_mask` fills a mask of N x N before it looks at blocks: several GiB for a row of 64k
tokens, in every forward. Here a block is judged by the smallest and largest values of its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens: FlexAttention's own choice


def block_mask(
    ends: Tensor,
    positions: Tensor | None = None,
    since: Tensor | None = None,
    run_of: Tensor | None = None,
):
    """FlexAttention's BlockMask. All tensors are int32 [N]; nothing waits for their device.

    The rule has no number but those in tensors: one program serves windows of all sizes, and chunks.

    ends: for every token the place behind the last one that sees it.
    positions: its place in its sequence.
    since: the first place in its sequence that it sees; None for all.
    run_of: the number of its run, in the order of the row, -1 for none; a token sees all of its run.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch, head, query, key):
        allowed = (key <= query) & (query < ends[key])
        if run_of is not None:
            allowed = allowed | ((run_of[query] == run_of[key]) & (run_of[query] >= 0))
        if since is not None:
            allowed = allowed & (positions[key] >= since[query])
        return allowed

    some, every = _judged(ends, positions, since, run_of)
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~every),
        *_in_order(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(ends), len(ends)),
    )


def _judged(
    ends: Tensor, positions: Tensor | None, since: Tensor | None, run_of: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bool [blocks of queries, blocks of keys], twice: where some query sees some key, and every one all.

    By trees and runs alone both are exact. With `since` a block of the first may have nothing to see, and
    one that is not in the second may have all: the kernel asks `sees` there.
    """
    begin = torch.arange(0, len(ends), BLOCK, device=ends.device)
    query, before = begin[:, None], begin[:, None] > begin
    low, high = _extremes(ends)
    some = (query == begin) | (before & (high > query))
    every = before & (low >= query + BLOCK)
    if run_of is not None:
        low, high = _extremes(run_of)
        # Of runs, a block has all from its first to its last one.
        first, _ = _extremes(run_of.masked_fill(run_of < 0, len(ends)))
        some |= torch.maximum(first[:, None], first) <= torch.minimum(high[:, None], high)
        one = (low == high) & (low >= 0)
        every |= one[:, None] & one & (low[:, None] == low)
    if since is not None:
        low, high = _extremes(positions)
        first, last = _extremes(since)
        some &= first[:, None] <= high
        every &= last[:, None] <= low
    whole = begin + BLOCK <= len(ends)
    return some, every & whole[:, None] & whole


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every block. The last value stands for what lacks behind it."""
    lacking = -len(values) % BLOCK
    blocks = torch.cat([values, values[-1:].expand(lacking)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row, how many blocks are true, and the places of all blocks, those first."""
    places = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], places.int()[None, None]
