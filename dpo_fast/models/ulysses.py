"""Ulysses sequence parallelism (arXiv 2309.14509): the ranks of a group score one batch together.

Each has a slice of the row's tokens in all layers. Attention alone looks at other tokens: before it, ranks
exchange slices of all heads for all tokens of some heads, and behind it they change back. The plan of the
row serves as it is. The head scores the rows of the own slice, and every rank gets all log-probs.

A rank's backward pass gives its part of the gradient, and the parts of all ranks add up to it: every
log-prob's gradient begins on the rank whose slice it is of, and exchanges carry it to the other slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dpo_fast.data.tree import Spans
from dpo_fast.errors import UserError


class Slice(NamedTuple):
    """What one rank has of a row.

    input_ids, position_ids: int64 [1, n], as many on every rank.
    spans: of the whole row with what fills the last slice up.
    own_U: the predictions that the slice's rows make, int64.
    rows_U: these rows, counted from the slice's beginning, int64 and as many as `own_U`.
    """

    input_ids: Tensor
    position_ids: Tensor
    spans: Spans
    own_U: Tensor
    rows_U: Tensor


class SequenceGroup:
    """The ranks that share a row. All call with the same batch, and everything is collective.

    group: of torch.distributed, with this process in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def cut(
        self, input_ids: Tensor, position_ids: Tensor, spans: Spans | None, rows_U: Tensor
    ) -> Slice:
        """This rank's slice of a batch; the arguments are fields of a `ScoredBatch`.

        Without spans, sequences that have a row each stand one after the other in one row, padding too.
        """
        if spans is None:
            spans = ((input_ids.shape[1], 0, -1),) * input_ids.shape[0]
        total = input_ids.numel()
        size = -(-total // self.size)
        filling = size * self.size - total
        if filling:  # a sequence that nothing is asked of
            spans = (*spans, (filling, 0, -1))
        start = self.rank * size

        own_U = ((rows_U >= start) & (rows_U < start + size)).nonzero().flatten()
        own = (self.slice_of(values.flatten())[None] for values in (input_ids, position_ids))
        return Slice(*own, spans, own_U, rows_U[own_U] - start)

    def slice_of(self, values_N: Tensor) -> Tensor:
        """Of numbers for all tokens of a row those of this rank's, [n]; what fills the row up has 0."""
        size = -(-len(values_N) // self.size)
        filled = pad(values_N, (0, size * self.size - len(values_N)))
        return filled[self.rank * size : (self.rank + 1) * size]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of this rank's tokens, [1, heads, n, dim], for all tokens of its share of the heads.

        Key heads that the ranks do not divide are repeated as often as they must be, so that each rank
        has those of its query heads.
        """
        heads, key_heads = query.shape[1], key.shape[1]
        if heads % self.size:
            raise UserError(_refusal(self.size, heads))
        copies = math.lcm(key_heads, self.size) // key_heads
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        tensors = (query, key, value)
        sent = [x[0].reshape(self.size, -1) for x in tensors]
        received = self._exchange(torch.cat(sent, dim=1))
        parts = received.split([each.shape[1] for each in sent], dim=1)
        return tuple(self._whole(part, x) for part, x in zip(parts, tensors))

    def _whole(self, part: Tensor, like: Tensor) -> Tensor:
        """Slices of some heads, as every rank has sent one, as all tokens. like: what was sent."""
        _, heads, tokens, width = like.shape
        own = heads // self.size
        slices = part.reshape(self.size, own, tokens, width)
        return slices.transpose(0, 1).reshape(1, own, self.size * tokens, width)

    def of_own_heads(self, values: Tensor) -> Tensor:
        """Of numbers for all heads, [heads], those of this rank's."""
        return values.chunk(self.size)[self.rank]

    def to_tokens(self, output: Tensor) -> Tensor:
        """The way back: all tokens of some heads, [1, N, own, dim], for all heads, [1, n, heads, dim]."""
        _, tokens, own, width = output.shape
        parts = self._exchange(output.reshape(self.size, -1))
        parts = parts.view(self.size, tokens // self.size, own, width).transpose(0, 1)
        return parts.reshape(1, tokens // self.size, self.size * own, width)

    def _exchange(self, sent: Tensor) -> Tensor:
        return _Exchange.apply(sent, self.group)

    def joined(self, outputs: Mapping[str, Tensor], own_U: Tensor, count: int) -> dict[str, Tensor]:
        """Every prediction's outputs, [count] each, the same bits on every rank.

        outputs: of this rank's predictions, fp32 or bool. own_U: which they are.
        """
        own = torch.stack([values.float() for values in outputs.values()])
        mine = own.new_zeros(len(own), count).index_copy(1, own_U, own)
        whole = _Sum.apply(mine, self.group)  # one rank's value plus zeros: exact
        return {name: row.to(outputs[name].dtype) for name, row in zip(outputs, whole)}

    def summed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the tokens of each rank's slice as sums over all tokens, the same on every rank."""
        return {name: _Sum.apply(values, self.group) for name, values in sums.items()}


class _Exchange(torch.autograd.Function):
    """Row r of [ranks, ...] goes to rank r; received are the rows that all ranks have for this one.

    Through deepspeed.comm, so that DeepSpeed's log of communication counts it.
    """

    @staticmethod
    def forward(ctx, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        import deepspeed.comm

        ctx.group = group
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        deepspeed.comm.all_to_all_single(received, sent.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the group. Every rank computes the same loss of it, so the gradient is there already."""

    @staticmethod
    def forward(ctx, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        import deepspeed.comm

        total = mine.clone()
        deepspeed.comm.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def check_heads(config, size: int) -> None:
    """Raises UserError if so many ranks cannot share a model's attention heads. config: the model's."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % size:
        raise UserError(_refusal(size, heads))


def cause(layout: str, others: str, group: SequenceGroup | None) -> tuple[str, str]:
    """What has sequences share a row, and what to set so that they do not, for a message.

    Where ranks share a row, all layouts stand in one.

    layout, others: of train.layout, those that share rows and those that do not.
    """
    if group is None:
        return f"train.layout={layout}", f"train.layout={others}"
    return f"parallel.sequence_parallel={group.size}", "parallel.sequence_parallel=1"


def _refusal(size: int, heads: int) -> str:
    fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return (
        f"parallel.sequence_parallel={size} does not divide the {heads} attention heads of the model, each "
        f"of which is computed by one rank; set it to one of {fitting}"
    )
