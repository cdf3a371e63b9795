"""Tiles of logits in PyTorch, and the blocks of the weight that they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast.ops import cpu
from dpo_fast.ops.eager import head_options
from dpo_fast.ops.linear_logp.call import HeadCall
from dpo_fast.ops.linear_logp.plan import HeadPlan

LOWEST = -1e30  # stands in for a row maximum of -inf (masked vocabulary), which would make NaN


class WeightBlocks:
    """Rows of the weight in one dtype, a block at a time in one buffer; views where it has that dtype."""

    def __init__(self, call: HeadCall, dtype: torch.dtype) -> None:
        self.weight_VD, self.block = call.weight_VD, None
        copied = self.weight_VD.dtype != dtype
        rows = min(call.plan.vocab_block, len(self.weight_VD)) if copied else 0
        self.buffer = self.weight_VD.new_empty(rows, self.weight_VD.shape[1], dtype=dtype)

    def __getitem__(self, block: slice) -> Tensor:
        if self.weight_VD.dtype == self.buffer.dtype:
            return self.weight_VD[block]
        rows = self.buffer[: block.stop - block.start]
        if self.block != block:
            rows.copy_(self.weight_VD[block])
            self.block = block
        return rows


class LogitTiles:
    """The logits of some rows, one vocabulary block at a time, in fp32 (fp64 for fp64)."""

    def __init__(self, call: HeadCall, blocks: WeightBlocks, buffer: Tensor, rows: slice) -> None:
        options = call.options
        self.weight, self.bias, self.plan = call.weight_VD, call.bias, call.plan
        self.precise_blocks = blocks
        self.softcap, self.temperature = options.softcap, options.temperature
        self.precision = torch.promote_types(call.hidden_TD.dtype, torch.float32)
        # The temperature acts after a soft cap. Without one both factors act on the hidden rows.
        self.factor = options.logit_scale / (1.0 if self.softcap else options.temperature)
        chunk = call.hidden_TD[rows].to(self.precision)
        self.rows = chunk * self.factor if self.factor != 1.0 else chunk
        self.buffer = buffer

    def blocks(self) -> Iterator[slice]:
        return vocab_blocks(self.plan, self.weight.shape[0])

    def logits(self, block: slice) -> Tensor:
        """Logits of one block, which the next call may overwrite."""
        out = cpu.product(self.rows, self.precise_blocks[block].t(), self.buffer)
        if self.bias is not None:
            out.add_(self.bias[block].to(self.precision), alpha=self.factor)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out

    def target_logits(self, targets: Tensor) -> Tensor:
        """About z_ty, before any tile; -1e30 where another shard has the target."""
        inside, columns = in_block(targets, slice(0, len(self.weight)))
        rows = self.rows if len(inside) == len(targets) else self.rows[inside]
        z = (rows * self.weight[columns]).sum(-1)
        if self.bias is not None:
            z = z + self.bias[columns].to(self.precision) * self.factor
        if self.softcap:
            z = head_options(z, 1.0, self.softcap, self.temperature)
        return self.rows.new_full(targets.shape, LOWEST).index_copy(0, inside, z)

    def mean_logits(self, weight_D: Tensor, bias: Tensor | float) -> Tensor:
        return self.rows @ weight_D + bias * self.factor


def tile_buffer(plan: HeadPlan, like: Tensor) -> Tensor:
    return like.new_empty(plan.token_chunk * plan.vocab_block)


def token_chunks(plan: HeadPlan, first: int, T: int) -> list[slice]:
    starts = range(first, T, plan.token_chunk)
    return [slice(start, min(start + plan.token_chunk, T)) for start in starts]


def vocab_blocks(plan: HeadPlan, V: int) -> Iterator[slice]:
    for first in range(0, V, plan.vocab_block):
        yield slice(first, min(first + plan.vocab_block, V))


def in_block(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its column there."""
    inside = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
    return inside, targets[inside] - block.start


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the product in the dtype of its operands."""
    if a.dtype == total.dtype and not cpu.by_onednn():
        torch.addmm(total, a, b, out=total)
    else:
        total += cpu.product(a, b)
