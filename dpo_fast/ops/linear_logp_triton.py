"""The schedules of `linear_logp` with Triton kernels, and cuBLAS for products without an epilogue.

Forward runs the statistics kernel and keeps lse, [T], alone. Backward recomputes the logits tile by
tile, writes g = dL/dz in the operands' dtype, and multiplies:

    dH = g W        dW = g^T H        db = column sums of g

So a trainable head costs 4 products (the plan's workspace is room for g), and a frozen head 3: its
forward computes u = dlogp/dH once, and its backward is the row scaling c u, which needs neither the
weight nor the hidden states.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.ops.plan import MIN_TILE_ELEMENTS, HeadPlan

ROW_MULTIPLE = 256  # tiles end where a kernel's tiles end, and pointers stay aligned
MAX_TOKENS = 8192  # beyond this a product gains nothing from more rows


@dataclass(frozen=True)
class Tiles:
    """How backward cuts [T, V]. `tokens_first` walks over the vocabulary per chunk."""

    token_chunk: int
    vocab_block: int
    tokens_first: bool

    def pairs(self, T: int, V: int):
        """(rows, columns) of every tile as slices, in the order of the schedule."""
        rows = [slice(i, min(i + self.token_chunk, T)) for i in range(0, T, self.token_chunk)]
        columns = [slice(i, min(i + self.vocab_block, V)) for i in range(0, V, self.vocab_block)]
        if self.tokens_first:
            return [(r, c) for r in rows for c in columns]
        return [(r, c) for c in columns for r in rows]


def tiles_for(
    T: int, V: int, itemsize: int, plan: HeadPlan, *, needs_hidden: bool, needs_weight: bool
) -> Tiles:
    """A pure function of sizes: the largest g that the plan's budget holds, long in T first."""
    elements = max(plan.workspace_bytes // itemsize, MIN_TILE_ELEMENTS)
    token_chunk = _fit(T, min(MAX_TOKENS, elements // 1024))
    vocab_block = _fit(V, elements // max(1, token_chunk))
    # With one block to go through there is nothing to add up. Otherwise the sum that is open all
    # the time is dW, [V, D] in fp32, when tokens come first, and dH, [T, D], when they do not.
    open_weight = V if needs_weight and token_chunk < T else 0
    open_hidden = T if needs_hidden and vocab_block < V else 0
    return Tiles(token_chunk, vocab_block, tokens_first=open_weight < open_hidden)


def _fit(size: int, limit: int) -> int:
    """`size` if it is within `limit`, else the limit rounded down to a multiple of the tiles."""
    return max(1, size) if size <= limit else max(limit // ROW_MULTIPLE, 1) * ROW_MULTIPLE


class _ProductSum:
    """out = sum of a_i @ b_i: fp32 between terms, rounded once; a single term goes to `out`."""

    def __init__(self, out: Tensor, terms: int):
        self.out, self.terms, self.seen, self.total = out, terms, 0, None

    def add(self, a: Tensor, b: Tensor) -> None:
        self.seen += 1
        if self.terms == 1:
            torch.mm(a, b, out=self.out)
            return
        if not a.is_cuda:  # CPU products have no fp32 output for bf16 inputs
            product = a.float() @ b.float()
            self.total = product if self.total is None else self.total.add_(product)
        elif self.total is None:
            self.total = torch.mm(a, b, out_dtype=torch.float32)
        else:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        if self.seen == self.terms:
            self.out.copy_(self.total)
            self.total = None


def _scalars(options) -> dict:
    return dataclasses.asdict(options)


def forward(hidden_TD, weight_VD, bias, targets_T, options, extras, plan: HeadPlan):
    """Returns {name: [T]} for logp and the extras, and what backward needs, by name."""
    from dpo_fast.kernels import linear_logp as kernels

    targets_T = targets_T.contiguous()
    bias = None if bias is None else bias.contiguous()
    outputs = kernels.statistics(
        hidden_TD, weight_VD, bias, targets_T, extras=extras, **_scalars(options)
    )
    lse_T = outputs.pop("lse")
    if plan.schedule == "logps":
        return outputs, {}
    if plan.schedule != "frozen":
        return outputs, {"lse": lse_T}
    direction_TD, _, _ = _gradients(
        torch.ones_like(lse_T), hidden_TD, weight_VD, bias, targets_T, options, plan, lse_T,
        (True, False, False),
    )  # fmt: skip
    return outputs, {"direction": direction_TD}


def backward(grad_T, hidden_TD, weight_VD, bias, targets_T, options, plan, saved, needs):
    """Returns (dH, dW, db), each None where `needs` says that nothing asks for it."""
    if plan.schedule == "frozen":
        direction_TD = saved["direction"]
        return (direction_TD * grad_T[:, None]).to(direction_TD.dtype), None, None
    return _gradients(
        grad_T.float().contiguous(), hidden_TD, weight_VD,
        None if bias is None else bias.contiguous(), targets_T.contiguous(), options, plan,
        saved["lse"], needs,
    )  # fmt: skip


def _gradients(grad_T, hidden_TD, weight_VD, bias, targets_T, options, plan, lse_T, needs):
    """The three gradients from recomputed tiles of g; None for those not needed."""
    from dpo_fast.kernels import linear_logp as kernels

    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    tiles = tiles_for(
        T, V, hidden_TD.element_size(), plan, needs_hidden=needs_hidden, needs_weight=needs_weight
    )
    dH = hidden_TD.new_empty(T, D) if needs_hidden else None
    dW = weight_VD.new_empty(V, D) if needs_weight else None
    db = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if needs_bias else None
    if T == 0 and needs_weight:
        dW.zero_()
    pairs = tiles.pairs(T, V)
    rows_seen, columns_seen = {r.start for r, _ in pairs}, {c.start for _, c in pairs}
    hidden_sums = {
        start: _ProductSum(dH[start : start + tiles.token_chunk], len(columns_seen))
        for start in (rows_seen if needs_hidden else ())
    }
    weight_sums = {
        start: _ProductSum(dW[start : start + tiles.vocab_block], len(rows_seen))
        for start in (columns_seen if needs_weight else ())
    }
    room = hidden_TD.new_empty(min(tiles.token_chunk, T) * min(tiles.vocab_block, V))
    for rows, columns in pairs:
        shape = rows.stop - rows.start, columns.stop - columns.start
        g = room[: shape[0] * shape[1]].view(shape)
        sums = kernels.gradient_tile(
            hidden_TD[rows], weight_VD[columns], None if bias is None else bias[columns],
            targets_T[rows], lse_T[rows], grad_T[rows], g, first_column=columns.start,
            column_sums=needs_bias, **_scalars(options),
        )  # fmt: skip
        if needs_hidden:
            hidden_sums[rows.start].add(g, weight_VD[columns])
        if needs_weight:
            weight_sums[columns.start].add(g.t(), hidden_TD[rows])
        if needs_bias:
            db[columns] += sums
    return dH, dW, None if db is None else db.to(weight_VD.dtype)
