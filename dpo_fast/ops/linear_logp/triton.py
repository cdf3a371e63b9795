"""The schedules of `linear_logp` with Triton kernels, and cuBLAS for products without an epilogue.

Tokens that are kept: their row offset m is chosen before the product, from the target's own logit and a
sample of the vocabulary; the kernel stores E = exp(z - m), and with E' = E - total at the target

    dH = diag(s) (E' W)        dW = E'^T (diag(s) H)        db = E'^T s        s = -c / total

A frozen head forms E' W in its forward pass, chunk by chunk, and its backward is a row scaling. Rows whose
logits leave the range of their offset are found and done again on the device. Tokens that are not
kept leave m and total alone; backward makes their logits again and multiplies tiles of g = dL/dz.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.ops.eager import head_options
from dpo_fast.ops.linear_logp.plan import CHUNK_TOKENS, HeadPlan, kept_stride
from dpo_fast.ops.linear_logp.row_sums import (
    ProductSum,
    RowSums,
    finite_offset,
    joined,
    patch_targets,
    product_fp32,
)

RANGE = (
    40.0  # largest |max z - m|: exp(40) V stays far from the end of fp32's range, squared as well
)
SAMPLE = 256  # columns whose maximum supports the target's logit as offset; V / 256 of a product


class Products(NamedTuple):
    """Who makes h W^T and what is left of it: `kernels.linear_logp.RowPass` and
    `kernels.gradient_tile.gradient_tile`, or their twins."""

    row_pass: Callable
    gradient_tile: Callable


def _triton() -> Products:
    from dpo_fast.kernels.gradient_tile import gradient_tile
    from dpo_fast.kernels.linear_logp import RowPass

    return Products(RowPass, gradient_tile)


def forward(
    hidden_TD,
    weight_VD,
    bias,
    targets_T,
    options,
    extras,
    plan: HeadPlan,
    shard,
    products: Products | None = None,
):
    """Returns {name: [T]} for logp and the extras, and what backward needs, by name."""
    products = products or _triton()
    bias = None if bias is None else bias.contiguous()
    head = _Head(weight_VD, bias, options, extras, shard, products)
    targets_T = targets_T.contiguous()
    T, K = len(targets_T), plan.kept_tokens
    V = shard.vocab if shard else len(weight_VD)
    kept_KV = _rows_of_exponentials(hidden_TD, K, len(weight_VD))
    parts, saved = [], {}
    if plan.schedule == "frozen" and plan.gemms == 2.0:
        direction_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
        room = _rows_of_exponentials(hidden_TD, plan.token_chunk, len(weight_VD))
        for rows in _blocks(0, T, plan.token_chunk):
            E = room[: rows.stop - rows.start]
            parts.append(head.keep(hidden_TD[rows], targets_T[rows], E))
            head.times_weight(E, -1 / parts[-1].total, direction_TD[rows])
        saved["direction"] = direction_TD
    else:
        for rows in _blocks(0, K, CHUNK_TOKENS):
            parts.append(head.keep(hidden_TD[rows], targets_T[rows], kept_KV[rows]))
        for rows in _blocks(K, T, CHUNK_TOKENS):
            parts.append(head.sums(hidden_TD[rows], targets_T[rows]))
    sums = joined(parts) if parts else head.sums(hidden_TD, targets_T)
    outputs = sums.outputs(V, extras)
    if plan.schedule == "logps" or saved:
        return outputs, saved
    if plan.schedule == "frozen":
        ones = torch.ones_like(sums.total)
        saved["direction"], _, _ = _gradients(
            ones,
            hidden_TD,
            weight_VD,
            bias,
            targets_T,
            options,
            plan,
            kept_KV,
            sums.offset,
            sums.total,
            (True, False, False),
            products,
        )
        return outputs, saved
    return outputs, {"kept": kept_KV, "offset": sums.offset, "total": sums.total}


def backward(
    grad_T,
    hidden_TD,
    weight_VD,
    bias,
    targets_T,
    options,
    plan,
    saved,
    needs,
    products: Products | None = None,
):
    """Returns (dH, dW, db), each None where `needs` says that nothing asks for it."""
    if plan.schedule == "frozen":
        direction_TD = saved["direction"]
        return (direction_TD * grad_T[:, None]).to(direction_TD.dtype), None, None
    return _gradients(
        grad_T.float().contiguous(),
        hidden_TD,
        weight_VD,
        bias,
        targets_T,
        options,
        plan,
        saved["kept"],
        saved["offset"],
        saved["total"],
        needs,
        products or _triton(),
    )


def _blocks(first: int, last: int, size: int):
    return [slice(start, min(start + size, last)) for start in range(first, last, max(size, 1))]


def _rows_of_exponentials(hidden_TD: Tensor, rows: int, V: int) -> Tensor:
    """[rows, V] uninitialised, each row aligned."""
    return hidden_TD.new_empty(rows, kept_stride(V))[:, :V]


@dataclasses.dataclass(frozen=True)
class _Head:
    """The forward passes over one head's vocabulary."""

    weight: Tensor
    bias: Tensor | None
    options: object
    extras: tuple[str, ...]
    shard: object
    products: Products

    def _pass(self, hidden_TD, targets_T, **kept):
        outside = () if self.options.softcap else ("mean_logit",)
        done = self.products.row_pass(
            hidden_TD,
            self.weight,
            self.bias,
            targets_T,
            options=dataclasses.asdict(self.options),
            extras=tuple(name for name in self.extras if name not in outside),
            **kept,
        )
        if "mean_logit" in self.extras and outside:
            done.sums["logits"] = self._logit_sums(hidden_TD)
        return done

    @functools.cached_property
    def _mean_column(self) -> tuple[Tensor, Tensor | float]:
        """Means over the vocabulary of the weight, [D], and of the bias, in fp32."""
        bias = 0.0 if self.bias is None else self.bias.mean(dtype=torch.float32)
        return self.weight.mean(0, dtype=torch.float32), bias

    def _logit_sums(self, hidden_TD: Tensor) -> Tensor:
        """sum_v z_tv = V factor (h . mean_v w_v + mean_v b_v): without a cap no pass is needed."""
        weight_D, bias = self._mean_column
        factor = len(self.weight) * self.options.logit_scale / self.options.temperature
        return (_precise_mv(hidden_TD, weight_D) + bias) * factor

    def sums(self, hidden_TD: Tensor, targets_T: Tensor) -> RowSums:
        sums = self._pass(hidden_TD, targets_T).sums
        sums = RowSums(offset=finite_offset(sums["maximum"]), **sums)
        if self.shard is None:
            return sums
        return sums.rebased(finite_offset(self.shard.maximum(sums.maximum))).over(self.shard)

    def keep(self, hidden_TD: Tensor, targets_T: Tensor, kept_TV: Tensor) -> RowSums:
        """Sums of these tokens; fills `kept_TV` with E'."""
        offset_T = self._offset(hidden_TD, targets_T)
        done = self._pass(hidden_TD, targets_T, offset_T=offset_T, kept_TV=kept_TV)
        maximum_T = done.sums["maximum"]
        if self.shard is not None:
            maximum_T = self.shard.maximum(maximum_T)
        best_T = finite_offset(maximum_T)
        wrong_T = ((best_T - offset_T).abs() > RANGE) & best_T.isfinite()
        offset_T.copy_(torch.where(wrong_T, best_T, offset_T))
        done.repair(wrong_T)
        sums = RowSums(offset=offset_T, **done.sums).over(self.shard)
        patch_targets(kept_TV, sums, targets_T, self.options, self.shard)
        return sums

    def _offset(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """A logit near the largest of each row, before the product: of its target, or of a sample."""
        from dpo_fast.kernels.target_product import target_product

        V = len(self.weight)
        bias = self.bias
        target_T = target_product(hidden_TD, self.weight, targets_T)
        if bias is not None:
            target_T = target_T + bias.float()[targets_T.clamp(0, V - 1)]
        step = -(-V // SAMPLE)
        sample_TS = product_fp32(hidden_TD, self.weight[::step].t())
        if bias is not None:
            sample_TS += bias[::step].float()
        sample_T = head_options(sample_TS, **dataclasses.asdict(self.options)).amax(1)
        target_T = head_options(target_T, **dataclasses.asdict(self.options))
        if self.shard is not None:  # elsewhere the target's product is 0, which says nothing
            inside = (targets_T >= 0) & (targets_T < V)
            target_T = torch.where(inside, target_T, -torch.inf)
        offset_T = torch.maximum(target_T, sample_T)
        if self.shard is not None:
            offset_T = self.shard.maximum(offset_T)
        return finite_offset(offset_T)

    def times_weight(self, E_TV: Tensor, scale_T: Tensor, out_TD: Tensor) -> None:
        """out = diag(scale) E' W times dz/d(h.w), rounded once."""
        scale_T = scale_T * (self.options.logit_scale / self.options.temperature)
        for rows in _blocks(0, len(E_TV), CHUNK_TOKENS):
            product = product_fp32(E_TV[rows], self.weight)
            torch.mul(product, scale_T[rows, None], out=product)
            out_TD[rows] = product


def _gradients(
    grad_T,
    hidden_TD,
    weight_VD,
    bias,
    targets_T,
    options,
    plan,
    kept_KV,
    offset_T,
    total_T,
    needs,
    products,
):
    """The three gradients from kept exponentials and recomputed tiles; None for those not needed."""
    (T, D), V, K = hidden_TD.shape, len(weight_VD), len(kept_KV)
    needs_hidden, needs_weight, needs_bias = needs
    dH = hidden_TD.new_empty(T, D) if needs_hidden else None
    dW = weight_VD.new_empty(V, D) if needs_weight else None
    db = hidden_TD.new_zeros(V, dtype=torch.float32) if needs_bias else None
    if T == 0 and needs_weight:
        dW.zero_()
    scale_K = -grad_T[:K] / total_T[:K]
    if needs_hidden and K:
        head = _Head(weight_VD, bias, options, (), None, products)
        head.times_weight(kept_KV, scale_K, dH[:K])
    scale_K = scale_K * (options.logit_scale / options.temperature)
    if needs_bias and K:
        db += _precise_mv(kept_KV.t(), scale_K)
    scaled_KD = (hidden_TD[:K] * scale_K[:, None]).to(hidden_TD.dtype) if needs_weight else None
    if K == T:
        if needs_weight and K:
            torch.mm(kept_KV.t(), scaled_KD, out=dW)
        return dH, dW, None if db is None else db.to(weight_VD.dtype)
    rows = _blocks(K, T, plan.token_chunk)
    columns = _blocks(0, V, plan.vocab_block)
    hidden_sums = {
        r.start: ProductSum(dH[r], len(columns), plan.residual_sums)
        for r in (rows if needs_hidden else ())
    }
    weight_sums = {
        c.start: ProductSum(dW[c], len(rows) + (K > 0), plan.residual_sums and plan.tokens_first)
        for c in (columns if needs_weight else ())
    }
    tiles = _GradientTiles(
        hidden_TD,
        weight_VD,
        bias,
        targets_T.contiguous(),
        options,
        offset_T,
        grad_T,
        total_T,
        plan,
        products,
    )
    order = [(r, c) for r in rows for c in columns]
    if not plan.tokens_first:
        order = [(r, c) for c in columns for r in rows]
    for r, c in order:
        if needs_weight and K and r is rows[0]:
            weight_sums[c.start].add(kept_KV[:, c].t(), scaled_KD)
        g, column_sums = tiles.tile(r, c, needs_bias)
        if needs_hidden:
            hidden_sums[r.start].add(g, weight_VD[c])
        if needs_weight:
            weight_sums[c.start].add(g.t(), hidden_TD[r])
        if needs_bias:
            db[c] += column_sums
    return dH, dW, None if db is None else db.to(weight_VD.dtype)


class _GradientTiles:
    """g = dL/d(h.w + b), one tile at a time in the same memory."""

    def __init__(
        self,
        hidden_TD,
        weight_VD,
        bias,
        targets_T,
        options,
        offset_T,
        grad_T,
        total_T,
        plan,
        products,
    ):
        self.products = products
        self.hidden, self.weight, self.targets, self.offset = (
            hidden_TD,
            weight_VD,
            targets_T,
            offset_T,
        )
        self.bias = None if bias is None else bias.contiguous()
        self.options = dataclasses.asdict(options)
        self.hit = grad_T * (options.logit_scale / options.temperature)
        self.scale = self.hit / total_T
        self.room = _rows_of_exponentials(
            hidden_TD, min(plan.token_chunk, len(hidden_TD)), min(plan.vocab_block, len(weight_VD))
        )

    def tile(self, r: slice, c: slice, column_sums: bool):
        """The tile of rows r and columns c, and its column sums in fp32, or None."""
        g = self.room[: r.stop - r.start, : c.stop - c.start]
        sums = self.products.gradient_tile(
            self.hidden[r],
            self.weight[c],
            None if self.bias is None else self.bias[c],
            self.targets[r],
            self.offset[r],
            self.hit[r],
            self.scale[r],
            g,
            options=self.options,
            first_column=c.start,
            column_sums=column_sums,
        )
        return g, sums


def _precise_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector in fp32 for an fp32 vector and a matrix of 16 bits, which is not copied: the
    vector as a sum of three in the matrix's dtype."""
    if matrix.dtype == torch.float32:
        return matrix @ vector
    parts, rest = [], vector
    for _ in range(3):
        parts.append(rest.to(matrix.dtype))
        rest = rest - parts[-1].float()
    return product_fp32(matrix, torch.stack(parts, 1)).sum(1)
