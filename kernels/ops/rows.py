"""Row sums of z = cap(logit_scale * (h W^T + b)) / temperature, and on request its exponentials.

`rows_kernel` consumes the fp32 accumulator of the product, so a logit is never rounded nor stored. It
reduces the rows of each tile, and with KEEP stores 2^(z - m) against a row offset m that is known before.
Logits and offsets are in powers of two, z / ln 2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from dpo_fast.kernels.product import (
    Operands,
    Tile,
    column_in_tile,
    less,
    offset_of,
    product,
    scores,
    tile_of,
)


class Given(NamedTuple):
    """What the epilogue reads."""

    bias_ptr: tl.tensor
    targets_ptr: tl.tensor
    offset_ptr: tl.tensor
    scale: tl.tensor
    cap_in: tl.tensor


class Written(NamedTuple):
    """What it writes: sums [plane, tile of V, T], the targets' logits, exponentials."""

    partials_ptr: tl.tensor
    top_ptr: tl.tensor
    kept: tl.tensor
    stride_kt: tl.tensor


class Epilogue(NamedTuple):
    """What is computed of each tile."""

    HAS_BIAS: tl.constexpr
    HAS_CAP: tl.constexpr
    NEGATIVE: tl.constexpr
    ENTROPY: tl.constexpr
    SQUARES: tl.constexpr
    MEAN: tl.constexpr
    TOP1: tl.constexpr
    KEEP: tl.constexpr


@triton.jit(do_not_specialize=["T"])
def rows_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    top_ptr,
    partials_ptr,
    offset_ptr,
    kept,
    repair_ptr,
    T,
    V,
    D,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_kt,
    scale,
    cap_in,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    KEEP: tl.constexpr,
    REPAIR: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Sums of every row over every tile, and with KEEP E = 2^(z - offset) (times the cap's slope).

    REPAIR does again the rows that repair_ptr[1:] names, and nothing at once if repair_ptr[0] is 0.
    """
    tiles_t, tiles_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    x = Operands(hidden, weight, T, V, D, stride_ht, stride_hd, stride_wv, stride_wd)
    given = Given(bias_ptr, targets_ptr, offset_ptr, scale, cap_in)
    to = Written(partials_ptr, top_ptr, kept, stride_kt)
    TILE: tl.constexpr = Tile(BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D, TMA, PRECISION)
    DO: tl.constexpr = Epilogue(HAS_BIAS, HAS_CAP, NEGATIVE, ENTROPY, SQUARES, MEAN, TOP1, KEEP)
    PARTS: tl.constexpr = 2 if FLATTEN and not EVEN_V else 1
    first, column, columns = tl.program_id(0), 0, tiles_v if PARTS == 1 else V // BLOCK_V
    for part in tl.static_range(PARTS):
        if part == 1:
            # The programs that the whole tiles left without work begin with the ragged ones.
            left = tl.num_programs(0) - tiles_t * columns % tl.num_programs(0)
            first = (first + left) % tl.num_programs(0)
            column, columns = columns, 1
        tiles = tiles_t * columns
        if REPAIR:
            tiles = tl.where(tl.load(repair_ptr) != 0, tiles, 0)
        for index in tl.range(first, tiles, tl.num_programs(0), flatten=FLATTEN and part == 0):
            pid_t, pid_v = tile_of(index, tiles_t, columns, GROUP_T)
            pid_v += column
            first_t = pid_t * BLOCK_T
            rows = first_t + tl.arange(0, BLOCK_T)
            mask_t = rows < T
            if REPAIR:
                wrong = tl.load(repair_ptr + 1 + rows, mask=mask_t, other=0)
                mask_t = wrong != 0
            if not REPAIR or tl.max(wrong.to(tl.int32), axis=0) > 0:
                MASKED: tl.constexpr = not EVEN_V and part == PARTS - 1
                _do_tile(x, given, to, mask_t, first_t, pid_v, tiles_v, TILE, DO, MASKED)


@triton.jit
def _do_tile(
    x,
    given,
    to,
    mask_t,
    first_t,
    pid_v,
    tiles_v,
    TILE: tl.constexpr,
    DO: tl.constexpr,
    MASKED: tl.constexpr,
):
    first_v = pid_v * TILE.BLOCK_V
    rows = first_t + tl.arange(0, TILE.BLOCK_T)
    offs_v = first_v + tl.arange(0, TILE.BLOCK_V)
    mask_v = offs_v < x.V
    acc = product(x, first_t, first_v, TILE)
    score, slope = scores(
        acc,
        given.bias_ptr,
        offs_v,
        mask_v,
        given.cap_in,
        DO.HAS_BIAS,
        DO.HAS_CAP,
        DO.NEGATIVE,
        DO.KEEP,
    )
    if MASKED:
        score = tl.where(mask_v[None, :], score, float("-inf"))
    maximum = given.scale * tl.max(score, axis=1)
    if DO.TOP1 and DO.KEEP:
        _store_top(score, given, to, rows, mask_t, first_v, TILE.BLOCK_V)
    if DO.KEEP:
        offset = tl.load(given.offset_ptr + rows, mask=mask_t, other=0.0)
    else:
        offset = offset_of(maximum)
    shifted = less(score, given.scale, offset[:, None])
    if DO.ENTROPY:  # 0 times -inf would be NaN; 2^-1e4 is 0 as well
        shifted = tl.maximum(shifted, -1e4, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(shifted)
    sums_ptr = to.partials_ptr + pid_v * x.T.to(tl.int64) + rows
    plane = tiles_v * x.T.to(tl.int64)
    _store_sums(sums_ptr, plane, score, e, shifted, maximum, mask_t, mask_v, DO)
    # Where the fewest values are alive: either place spills in the other's case.
    if DO.TOP1 and not DO.KEEP:
        _store_top(score, given, to, rows, mask_t, first_v, TILE.BLOCK_V)
    if DO.KEEP:
        if DO.HAS_CAP:
            e *= slope
        if TILE.TMA:
            to.kept.store([first_t, first_v], e.to(to.kept.dtype))
        else:
            out_ptrs = to.kept + rows.to(tl.int64)[:, None] * to.stride_kt + offs_v[None, :]
            mask = mask_t[:, None] & mask_v[None, :]
            tl.store(out_ptrs, e.to(to.kept.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(sums_ptr, plane, score, e, shifted, maximum, mask_t, mask_v, DO: tl.constexpr):
    """Sums of one tile's rows; masked columns have e = 0."""
    tl.store(sums_ptr, maximum, mask=mask_t)
    tl.store(sums_ptr + plane, tl.sum(e, axis=1), mask=mask_t)
    if DO.ENTROPY:
        weighted = tl.sum(e * shifted, axis=1)
        tl.store(sums_ptr + 2 * plane, weighted, mask=mask_t)
    if DO.SQUARES:
        tl.store(sums_ptr + 3 * plane, tl.sum(e * e, axis=1), mask=mask_t)
    if DO.MEAN:
        total = tl.sum(tl.where(mask_v[None, :], score, 0.0), axis=1)
        tl.store(sums_ptr + 4 * plane, total, mask=mask_t)


@triton.jit
def _store_top(score, given, to, rows, mask_t, first_v, BLOCK_V: tl.constexpr):
    """The logits of the targets that this tile has, to compare with the rows' maxima."""
    column = column_in_tile(given.targets_ptr, rows, mask_t, 0, first_v, BLOCK_V)
    is_target = tl.arange(0, BLOCK_V)[None, :] == column[:, None]
    top = given.scale * tl.max(tl.where(is_target, score, float("-inf")), axis=1)
    tl.store(to.top_ptr + rows, top, mask=mask_t & (column >= 0))
