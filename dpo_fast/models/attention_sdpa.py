"""PyTorch's SDPA over the segments of a row, in memory that grows with the row and not with its square.

Plain causal attention is all that SDPA does without a mask, and a mask is [queries, keys]. A segment whose
queries see a prefix too, or with a window, a soft cap or sinks, is computed otherwise:

    prefix      two plain calls, over the keys of the prefix and over the segment's own. Their results are
                joined by their log-sum-exps. Backward is the two calls' own with the joined result, as in
                ring attention (Liu et al. 2023, arXiv:2310.01889).
    window      blocks of queries, each with the keys that it may see and a mask of that size
    runs        the same: tokens of an image that see each other
    cap, sinks  blocks of queries with their scores written out, recomputed in backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dpo_fast.models.attention_plan import AttentionPlan, Segment
from dpo_fast.ops.once import once_differentiable

BLOCK = 256  # queries of a block at least, where a window makes blocks
MASK_ELEMENTS = 1 << 22  # of a mask or of scores that are not worth cutting into blocks

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Some queries of a segment, and the keys that they may see.

    first, end: the queries.
    low, high: the keys, counted from the first of the prefix.
    ahead: keys before the segment's first query.
    window: as the layer has it; None for all.
    runs: those of the segment.
    """

    first: int
    end: int
    low: int
    high: int
    ahead: int
    window: int | None
    runs: tuple[tuple[int, int], ...] = ()

    def mask(self, device: torch.device) -> Tensor:
        """Bool [queries, keys], true where the query sees the key."""
        query = torch.arange(self.first, self.end, device=device) + self.ahead
        behind = query[:, None] - torch.arange(self.low, self.high, device=device)
        sees = behind >= 0
        for first, end in self.runs:
            rows = slice(max(first - self.first, 0), max(end - self.first, 0))
            keys = (max(each + self.ahead - self.low, 0) for each in (first, end))
            sees[rows, slice(*keys)] = True
        return sees if self.window is None else sees & (behind < self.window)


def blocks_of(segment: Segment, window: int | None, size: int) -> Iterator[Block]:
    """The queries of a segment, `size` at a time."""
    ahead = segment.prefix
    for first in range(0, segment.queries, size):
        end = min(first + size, segment.queries)
        low = 0 if window is None else max(0, ahead + first - window + 1)
        last = max((last for start, last in segment.runs if start < end), default=end)
        yield Block(first, end, low, ahead + max(last, end), ahead, window, segment.runs)


def sdpa(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a row, segment by segment. A soft cap or sinks make it write out the scores."""
    sizes = [segment.queries for segment in plan.segments]
    rows = zip(plan.segments, *(x.split(sizes, dim=2) for x in (query, key, value)))
    explicit = softcap is not None or sinks is not None
    outputs, continued = [], {}
    for place, (segment, q, k, v) in enumerate(rows):
        if segment.prefix:
            before = (each[:, :, : segment.prefix] for each in continued[segment.parent])
            k, v = (torch.cat(both, dim=2) for both in zip(before, (k, v)))
        if place in plan.continued:
            continued[place] = k, v
        narrow = window if window is not None and k.shape[2] > window else None
        if explicit:
            outputs.append(_written_out(segment, narrow, q, k, v, scale, softcap, sinks))
        elif q.device.type in ("cpu", "meta"):
            outputs.append(_on_cpu(segment, narrow, q, k, v, scale))
        else:
            outputs.append(_masked(segment, narrow, q, k, v, scale))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def _on_cpu(segment: Segment, window: int | None, q, k, v, scale: float) -> Tensor:
    """PyTorch's flash attention for CPUs. It wants one head size for all three: zeros fill them up."""
    if torch.is_autocast_enabled("cpu"):  # which casts what torch's own function is given
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    size = v.shape[-1]
    widest = max(q.shape[-1], size)
    q, k, v = (x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    output = _FlashOnCpu.apply(q, k, v, segment, window, scale)
    return output if size == widest else output[..., :size]


class _FlashOnCpu(torch.autograd.Function):
    """One segment: q [1, heads, queries, dim]; k, v [1, key heads, prefix + queries, dim].

    Keys of grouped heads are repeated for the time of a call, and kept as they are.
    """

    @staticmethod
    def forward(ctx, q, k, v, segment, window, scale):
        ctx.segment, ctx.window, ctx.scale = segment, window, scale
        parts = list(_parts(segment, window))
        keys, values = (_for_every_head(x, q) for x in (k, v))
        found = []
        for part in parts:
            mask = part.mask(q)
            found.append(
                _flash(
                    q[:, :, part.queries],
                    keys[:, :, part.keys],
                    values[:, :, part.keys],
                    0.0,
                    part.causal,
                    attn_mask=mask,
                    scale=scale,
                )
            )
        output, lse = _joined(parts, found)
        ctx.save_for_backward(q, k, v, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, output, lse = ctx.saved_tensors
        keys, values = (_for_every_head(x, q) for x in (k, v))
        dq, dk, dv = None, None, None
        parts = list(_parts(ctx.segment, ctx.window))
        for part in parts:
            rows, columns = part.queries, part.keys
            slopes = _flash_backward(
                grad[:, :, rows],
                q[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                part.causal,
                attn_mask=part.mask(q),
                scale=ctx.scale,
            )
            if len(parts) == 1 and part.block is None:
                dq, dk, dv = slopes
                break
            if dq is None:
                dq, dk, dv = (torch.zeros_like(x) for x in (q, keys, values))
            for total, where, slope in zip((dq, dk, dv), (rows, columns, columns), slopes):
                total[:, :, where] += slope
        return dq, _of_key_heads(dk, k), _of_key_heads(dv, v), None, None, None


class _Part(NamedTuple):
    """One call: queries and keys of a segment, and how the queries see them."""

    queries: slice
    keys: slice
    causal: bool
    block: Block | None = None

    def mask(self, like: Tensor) -> Tensor | None:
        """Added to the scores: 0, or -inf where the query does not see the key."""
        if self.block is None:
            return None
        sees = self.block.mask(like.device)
        return torch.zeros_like(sees, dtype=like.dtype).masked_fill_(~sees, -torch.inf)


def _parts(segment: Segment, window: int | None) -> Iterator[_Part]:
    """The calls that a segment takes. Without a window all of them have all its queries."""
    whole, ahead = slice(0, segment.queries), segment.prefix
    if window is None and not segment.runs:
        if ahead:
            yield _Part(whole, slice(0, ahead), causal=False)
        yield _Part(whole, slice(ahead, ahead + segment.queries), causal=True)
        return
    for block in blocks_of(segment, window, max(window or 0, BLOCK)):
        yield _Part(
            slice(block.first, block.end), slice(block.low, block.high), causal=False, block=block
        )


def _joined(parts: list[_Part], found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all parts: of the same queries, or of others one after the other."""
    if len(found) == 1:
        return found[0]
    if parts[0].block is not None:
        return tuple(torch.cat(pieces, dim=2) for pieces in zip(*found))
    (prefix, prefix_lse), (own, own_lse) = found
    lse = torch.logaddexp(prefix_lse, own_lse)
    shares = ((each - lse).exp_().unsqueeze(-1) for each in (prefix_lse, own_lse))
    output = sum(each * share for each, share in zip((prefix, own), shares))
    return output.to(own.dtype), lse


def _for_every_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, repeated for every head of the queries."""
    times = q.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _of_key_heads(slope: Tensor, x: Tensor) -> Tensor:
    """The gradient of what `_for_every_head` repeated."""
    times = slope.shape[1] // x.shape[1]
    return slope if times == 1 else slope.unflatten(1, (x.shape[1], times)).sum(2)


def _masked(segment: Segment, window: int | None, q, k, v, scale: float) -> Tensor:
    """SDPA of another device. Its mask is whole if it is small; else blocks of it are made twice."""
    grouped = q.shape[1] != k.shape[1]
    if not segment.prefix and window is None and not segment.runs:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )

    def attend(q, k, v, block: Block) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=block.mask(q.device), scale=scale, enable_gqa=grouped
        )

    return _in_blocks(segment, window, attend, 1, q, k, v)


def _written_out(
    segment: Segment, window: int | None, q, k, v, scale: float, softcap, sinks
) -> Tensor:
    """softmax over softcap * tanh(scores / softcap) and the sink, whose weight goes nowhere."""

    def attend(q, k, v, block: Block) -> Tensor:
        k, v = (_for_every_head(x, q) for x in (k, v))
        scores = (q @ k.transpose(2, 3)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~block.mask(q.device), -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        return weights.to(v.dtype) @ v

    return _in_blocks(segment, window, attend, q.shape[1], q, k, v)


def _in_blocks(
    segment: Segment, window: int | None, attend: Callable[..., Tensor], heads: int, q, k, v
) -> Tensor:
    """`attend` over all queries at once, or over blocks of them that backward computes again.

    heads: scores of one query and one key that `attend` holds.
    """
    keys = segment.prefix + segment.queries
    if heads * segment.queries * keys <= MASK_ELEMENTS:
        (block,) = blocks_of(segment, window, segment.queries)
        return attend(q, k[:, :, block.low :], v[:, :, block.low :], block)
    size = max(MASK_ELEMENTS // (heads * keys), 16)
    if window is not None:  # a block's keys are few, whatever the row
        size = max(size, min(window, max(MASK_ELEMENTS // (heads * 2 * window), 16)))
    outputs = []
    for block in blocks_of(segment, window, size):
        seen = slice(block.low, block.high)
        rows = q[:, :, block.first : block.end], k[:, :, seen], v[:, :, seen]
        outputs.append(checkpoint(attend, *rows, block, use_reentrant=False))
    return torch.cat(outputs, dim=2)
