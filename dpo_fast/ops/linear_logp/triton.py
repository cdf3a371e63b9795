"""The schedules of `linear_logp` with Triton kernels, and cuBLAS for products without an epilogue.

Kept tokens: their row offset m is chosen before the product, from the target's own logit and a sample of
the vocabulary. The kernel stores E = 2^(z - m), z in powers of two, and with E' = E - total at the target

    dH = diag(s) (E' W)        dW = E'^T (diag(s) H)        db = E'^T s        s = -c / total

Rows whose logits leave the range of their offset are found and done again on the device. A frozen head
forms E' W in its forward pass, chunk by chunk; its backward scales rows.

Other tokens: forward saves m and total only. Backward makes their logits again, tile by tile, and
multiplies tiles of g = dL/dz.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.ops.linear_logp.call import HeadCall
from dpo_fast.ops.linear_logp.plan import CHUNK_TOKENS, kept_stride
from dpo_fast.ops.linear_logp.row_sums import (
    ProductSum,
    RowSums,
    finite_offset,
    joined,
    patch_targets,
    product_fp32,
)

UNIT = math.log(2)  # nats; the kernels' logits and offsets are in powers of two
# Largest |max z - m|: 2^58 V stays far from the end of fp32's range, squared as well.
RANGE = 58.0
SAMPLE = 256  # columns whose maximum supports the target's logit as offset: V / 256 of a product


class Products(NamedTuple):
    """The kernels that multiply h W^T and consume it: Triton's, or their twins in csrc.

    row_pass: launches the pass over a block of tokens and returns its `sums` and `repair`. The class
        `kernels.linear_logp.RowPass` is one: its constructor launches.
    gradient_tile: as `kernels.gradient_tile.gradient_tile`.
    """

    row_pass: Callable
    gradient_tile: Callable


def _triton() -> Products:
    from dpo_fast.kernels.gradient_tile import gradient_tile
    from dpo_fast.kernels.linear_logp import RowPass

    return Products(RowPass, gradient_tile)


def forward(
    call: HeadCall, extras: tuple[str, ...], products: Products | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `op.Schedules.forward`. products: Triton's by default."""
    call, products = _contiguous(call), products or _triton()
    passes = _Passes(call, extras, products)
    plan, T, K = call.plan, len(call.targets_T), call.plan.kept_tokens
    if plan.schedule == "frozen" and plan.gemms == 2.0:
        sums, direction_TD = _direction(passes)
        return sums.outputs(call.vocabulary, extras), {"direction": direction_TD}
    kept_TV = _rows_of_exponentials(call.hidden_TD, K, len(call.weight_VD))
    parts = [passes.keep(rows, kept_TV[rows]) for rows in _blocks(0, K, CHUNK_TOKENS)]
    parts += [passes.sums(rows) for rows in _blocks(K, T, CHUNK_TOKENS)]
    sums = joined(parts or [passes.sums(slice(0, 0))])
    outputs = sums.outputs(call.vocabulary, extras)
    if plan.schedule == "logps":
        return outputs, {}
    saved = {"kept": kept_TV, "offset": sums.offset, "total": sums.total}
    if plan.schedule == "frozen":
        ones_T = torch.ones_like(sums.total)
        direction_TD, _, _ = _gradients(call, ones_T, saved, (True, False, False), products)
        return outputs, {"direction": direction_TD}
    return outputs, saved


def backward(
    call: HeadCall,
    grad_T: Tensor,
    saved: dict[str, Tensor],
    needs: Sequence[bool],
    products: Products | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `op.Schedules.backward`."""
    grad_T = grad_T.float().contiguous()
    return _gradients(_contiguous(call), grad_T, saved, needs, products or _triton())


def _contiguous(call: HeadCall) -> HeadCall:
    """With the targets and the bias as kernels read them."""
    bias = None if call.bias is None else call.bias.contiguous()
    return dataclasses.replace(call, bias=bias, targets_T=call.targets_T.contiguous())


def _blocks(first: int, last: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, max(size, 1))]


def _rows_of_exponentials(hidden_TD: Tensor, rows: int, V: int) -> Tensor:
    """[rows, V] uninitialised, each row aligned."""
    return hidden_TD.new_empty(rows, kept_stride(V))[:, :V]


def _direction(passes: _Passes) -> tuple[RowSums, Tensor]:
    """Row sums, and dH for a gradient of 1, [T, D]: exponentials chunk by chunk in the same memory."""
    call, chunk = passes.call, passes.call.plan.token_chunk
    direction_TD = torch.empty_like(call.hidden_TD, memory_format=torch.contiguous_format)
    room_TV = _rows_of_exponentials(call.hidden_TD, chunk, len(call.weight_VD))
    parts = []
    for rows in _blocks(0, len(direction_TD), chunk):
        kept_TV = room_TV[: rows.stop - rows.start]
        parts.append(passes.keep(rows, kept_TV))
        _times_weight(call, kept_TV, parts[-1].total, None, direction_TD[rows])
    return joined(parts or [passes.sums(slice(0, 0))]), direction_TD


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Forward passes over the vocabulary, each for a block of rows."""

    call: HeadCall
    extras: tuple[str, ...]
    products: Products

    def sums(self, rows: slice) -> RowSums:
        """Sums of these rows against an offset just above their maximum."""
        sums, shard = RowSums(unit=UNIT, **self._start(rows).sums), self.call.shard
        if shard is None:
            return sums
        return sums.rebased(finite_offset(shard.maximum(sums.maximum))).over(shard)

    def keep(self, rows: slice, kept_TV: Tensor) -> RowSums:
        """Sums of these rows; fills `kept_TV` with E'."""
        call, (score_T, offset_T) = self.call, self._offset(rows)
        settle = {"largest_shift": RANGE} if call.shard is None else {}
        row_pass = self._start(rows, score_T=score_T, offset_T=offset_T, kept_TV=kept_TV, **settle)
        if row_pass.settled:
            return RowSums(unit=UNIT, **row_pass.sums)
        maximum_T = row_pass.sums["maximum"]
        if call.shard is not None:
            maximum_T = call.shard.maximum(maximum_T)
        best_T = _offset_of(maximum_T)
        wrong_T = ((best_T - offset_T).abs() > RANGE) & best_T.isfinite()
        offset_T.copy_(torch.where(wrong_T, best_T, offset_T))
        row_pass.repair(wrong_T)
        sums = RowSums(unit=UNIT, **row_pass.sums).over(call.shard)
        # A capped score is the hyperbolic tangent itself.
        slope_T = 1 - score_T.square() if call.options.softcap else None
        patch_targets(kept_TV, sums, call.targets_T[rows], slope_T, call.shard)
        return sums

    def _start(self, rows: slice, **kept):
        """Launch the pass over these rows. Returns what `products.row_pass` does."""
        call = self.call
        hidden_TD = call.hidden_TD[rows]
        # Without a soft cap the mean logit needs no pass.
        outside = "mean_logit" in self.extras and not call.options.softcap
        row_pass = self.products.row_pass(
            hidden_TD,
            call.weight_VD,
            call.bias,
            call.targets_T[rows],
            options=dataclasses.asdict(call.options),
            extras=tuple(name for name in self.extras if not (outside and name == "mean_logit")),
            **kept,
        )
        if outside:
            row_pass.sums["logits"] = self._logit_sums(hidden_TD)
        return row_pass

    @functools.cached_property
    def _mean_column(self) -> tuple[Tensor, Tensor | float]:
        """Means over the vocabulary of the weight, [D], and of the bias, in fp32."""
        bias = 0.0 if self.call.bias is None else self.call.bias.mean(dtype=torch.float32)
        return self.call.weight_VD.mean(0, dtype=torch.float32), bias

    def _logit_sums(self, hidden_TD: Tensor) -> Tensor:
        """sum_v z_tv = V factor (h . mean_v w_v + mean_v b_v)."""
        column_D, bias = self._mean_column
        options = self.call.options
        factor = len(self.call.weight_VD) * options.logit_scale / options.temperature
        return (_precise_mv(hidden_TD, column_D) + bias) * factor

    def _offset(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The targets' scores, and a logit near the largest of each row, before the product: of its
        target, or of a sample."""
        from dpo_fast.kernels.target_product import scores_and_offsets

        call = self.call
        step = -(-len(call.weight_VD) // SAMPLE)
        score_T, offset_T = scores_and_offsets(
            call.hidden_TD[rows],
            call.weight_VD,
            call.bias,
            call.targets_T[rows],
            dataclasses.asdict(call.options),
            product_fp32(call.hidden_TD[rows], call.weight_VD[::step].t()),
            step,
            whole=call.shard is None,
        )
        if call.shard is not None:
            offset_T = _offset_of(call.shard.maximum(offset_T))
        return score_T, offset_T


def _times_weight(
    call: HeadCall, kept_TV: Tensor, total_T: Tensor, grad_T: Tensor | None, out_TD: Tensor
) -> None:
    """out = diag(-grad / total) E' W times dz/d(h.w), rounded once. grad_T: 1 if None."""
    from dpo_fast.kernels.scale_rows import scale_rows

    for rows in _blocks(0, len(kept_TV), CHUNK_TOKENS):
        product = product_fp32(kept_TV[rows], call.weight_VD)
        slope_T = None if grad_T is None else grad_T[rows]
        scale_rows(
            product, total_T[rows], out_TD[rows], factor=-call.options.factor, slope_T=slope_T
        )


def _gradients(call, grad_T, saved, needs, products) -> tuple[Tensor | None, ...]:
    """The three gradients from kept exponentials and recomputed tiles; None for those not needed."""
    from dpo_fast.kernels.scale_rows import scale_rows

    kept_TV, hidden_TD, weight_VD = saved["kept"], call.hidden_TD, call.weight_VD
    T, K = len(hidden_TD), len(kept_TV)
    dH = hidden_TD.new_empty(hidden_TD.shape) if needs[0] else None
    dW = weight_VD.new_empty(weight_VD.shape) if needs[1] else None
    db = hidden_TD.new_zeros(len(weight_VD), dtype=torch.float32) if needs[2] else None
    total_T, slope_T = saved["total"][:K], grad_T[:K]
    if dH is not None and K:
        _times_weight(call, kept_TV, total_T, slope_T, dH[:K])
    if db is not None and K:
        db += _precise_mv(kept_TV.t(), -call.options.factor * slope_T / total_T)
    scaled_TD = None
    if dW is not None:
        scaled_TD = hidden_TD.new_empty(K, hidden_TD.shape[1])
        scale_rows(hidden_TD[:K], total_T, scaled_TD, factor=-call.options.factor, slope_T=slope_T)
    if K < T:
        tiles = _GradientTiles(call, grad_T, saved, products)
        _add_tiles(tiles, dH, dW, db, kept_TV, scaled_TD)
    elif dW is not None:
        torch.mm(kept_TV.t(), scaled_TD, out=dW) if K else dW.zero_()
    return dH, dW, None if db is None else db.to(weight_VD.dtype)


def _add_tiles(tiles: _GradientTiles, dH, dW, db, kept_TV: Tensor, scaled_TD) -> None:
    """Add recomputed tiles to the gradients, and to dW also the product of the kept tokens."""
    call, plan, K = tiles.call, tiles.call.plan, len(kept_TV)
    rows = _blocks(K, len(call.hidden_TD), plan.token_chunk)
    columns = _blocks(0, len(call.weight_VD), plan.vocab_block)
    hidden_sums, weight_sums = {}, {}
    if dH is not None:
        make = functools.partial(ProductSum, terms=len(columns), residual=plan.residual_sums)
        hidden_sums = {r.start: make(dH[r]) for r in rows}
    if dW is not None:
        residual = plan.residual_sums and plan.tokens_first
        make = functools.partial(ProductSum, terms=len(rows) + (K > 0), residual=residual)
        weight_sums = {c.start: make(dW[c]) for c in columns}
    order = [(r, c) for r in rows for c in columns]
    if not plan.tokens_first:
        order = [(r, c) for c in columns for r in rows]
    for r, c in order:
        if dW is not None and K and r is rows[0]:
            weight_sums[c.start].add(kept_TV[:, c].t(), scaled_TD)
        g, column_sums = tiles.tile(r, c, db is not None)
        if dH is not None:
            hidden_sums[r.start].add(g, call.weight_VD[c])
        if dW is not None:
            weight_sums[c.start].add(g.t(), call.hidden_TD[r])
        if db is not None:
            db[c] += column_sums


class _GradientTiles:
    """g = dL/d(h.w + b), one tile at a time in the same memory."""

    def __init__(self, call: HeadCall, grad_T: Tensor, saved: dict, products: Products) -> None:
        self.call, self.products, self.offset_T = call, products, saved["offset"]
        self.hit_T = grad_T * call.options.factor
        self.scale_T = self.hit_T / saved["total"]
        rows = min(call.plan.token_chunk, len(call.hidden_TD))
        columns = min(call.plan.vocab_block, len(call.weight_VD))
        self.room_TV = _rows_of_exponentials(call.hidden_TD, rows, columns)

    def tile(self, r: slice, c: slice, column_sums: bool) -> tuple[Tensor, Tensor | None]:
        """The tile of rows r and columns c, and its column sums in fp32, or None."""
        call, g = self.call, self.room_TV[: r.stop - r.start, : c.stop - c.start]
        sums = self.products.gradient_tile(
            call.hidden_TD[r],
            call.weight_VD[c],
            None if call.bias is None else call.bias[c],
            call.targets_T[r],
            self.offset_T[r],
            self.hit_T[r],
            self.scale_T[r],
            g,
            options=dataclasses.asdict(call.options),
            first_column=c.start,
            column_sums=column_sums,
        )
        return g, sums


def _offset_of(maximum_T: Tensor) -> Tensor:
    """As `kernels.product.offset_of`."""
    finite_T = finite_offset(maximum_T)
    return finite_T + finite_T.abs() * 2.0**-22


def _precise_mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector in fp32, for an fp32 vector and a matrix of 16 bits.

    The vector is split into three of the matrix's dtype, so that the matrix is not copied.
    """
    if matrix.dtype == torch.float32:
        return matrix @ vector
    parts, rest = [], vector
    for _ in range(3):
        parts.append(rest.to(matrix.dtype))
        rest = rest - parts[-1].float()
    return product_fp32(matrix, torch.stack(parts, 1)).sum(1)
