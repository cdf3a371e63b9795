"""Joins the tiles of each row, first to last, and makes the log-probs of the targets."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from dpo_fast.kernels.product import less, offset_of

MERGE_TOKENS, MERGE_TILES = 32, 64
LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partials_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    squares_ptr,
    logits_ptr,
    score_ptr,
    targets_ptr,
    offset_ptr,
    shift_ptr,
    logp_ptr,
    kept_ptr,
    flags_ptr,
    repair_ptr,
    scale,
    largest_shift,
    stride_kt,
    T,
    V,
    tiles_v,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    REPAIR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SETTLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the tiles of each row, in order.

    SETTLE: rows further than largest_shift from their offset are flagged and get another one; at the
    targets of the others E becomes E' = E - total, formed in fp32 and never above 0.

    Sums are against the row's offset with KEEP, where all tiles share it. Without, each tile had its own,
    and sums are against one just above the row's maximum. So is the target's distance, rounded once.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < T
    if REPAIR:
        tiles_v = tl.where(tl.load(repair_ptr) != 0, tiles_v, 0)
        mask_t = tl.load(repair_ptr + 1 + rows, mask=mask_t, other=0) != 0
    splits = tl.arange(0, BLOCK_S)
    plane = tiles_v * T.to(tl.int64)
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for start in range(0, tiles_v, BLOCK_S):
        mask = (start + splits < tiles_v)[:, None] & mask_t[None, :]
        in_ptrs = partials_ptr + (start + splits).to(tl.int64)[:, None] * T + rows[None, :]
        part = tl.load(in_ptrs, mask=mask, other=float("-inf"))
        maximum = tl.maximum(maximum, tl.max(part, axis=0))
    if KEEP:
        offset = tl.load(offset_ptr + rows, mask=mask_t, other=0.0)
    else:
        offset = offset_of(maximum)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted, squares, sums = total, total, total
    for start in range(0, tiles_v, BLOCK_S):
        mask = (start + splits < tiles_v)[:, None] & mask_t[None, :]
        in_ptrs = partials_ptr + (start + splits).to(tl.int64)[:, None] * T + rows[None, :]
        part_total = tl.load(in_ptrs + plane, mask=mask, other=0.0)
        gain, shift = 1.0, 0.0
        if not KEEP:
            part_offset = offset_of(tl.load(in_ptrs, mask=mask, other=float("-inf")))
            # A tile of -inf alone has offset 0 and sums of 0, whatever the row's maximum is.
            shift = tl.where(part_total > 0, part_offset - offset[None, :], 0.0)
            gain = tl.exp2(shift)
        total += tl.sum(gain * part_total, axis=0)
        if ENTROPY:
            part = tl.load(in_ptrs + 2 * plane, mask=mask, other=0.0)
            part += shift * part_total
            # So far below the maximum that shift * total is -inf: 0 times that is NaN.
            if not KEEP:
                part = tl.where(gain == 0.0, 0.0, part)
            weighted += tl.sum(gain * part, axis=0)
        if SQUARES:
            part = tl.load(in_ptrs + 3 * plane, mask=mask, other=0.0)
            squares += tl.sum(gain * gain * part, axis=0)
        if MEAN:
            sums += tl.sum(tl.load(in_ptrs + 4 * plane, mask=mask, other=0.0), axis=0)
    # Beyond 1e8 the largest logit vanishes against the offset just above it: the row is that logit alone.
    vanished = (total == 0.0) & (maximum >= offset - tl.abs(offset) * 2.0**-20)
    total = tl.where(vanished, 1.0, total)
    tl.store(maximum_ptr + rows, maximum, mask=mask_t)
    if not KEEP:
        tl.store(offset_ptr + rows, offset, mask=mask_t)
    tl.store(total_ptr + rows, total, mask=mask_t)
    score = tl.load(score_ptr + rows, mask=mask_t, other=0.0)
    target = tl.load(targets_ptr + rows, mask=mask_t, other=-1)
    inside, inf = (target >= 0) & (target < V), float("inf")
    shift = tl.where(inside, less(score, scale, offset), -inf)
    tl.store(shift_ptr + rows, shift, mask=mask_t)
    logp = shift * LN2 - tl.log(tl.where(mask_t, total, 1.0))
    # Not above 0, where rounding might lift it, and a NaN stays one.
    logp = tl.where(logp > 0.0, 0.0, logp)
    tl.store(logp_ptr + rows, logp, mask=mask_t)
    if SETTLE:
        settled = mask_t & inside
        if not REPAIR:
            best = offset_of(maximum)
            wrong = (tl.abs(best - offset) > largest_shift) & (tl.abs(best) < inf) & mask_t
            tl.store(offset_ptr + rows, tl.where(wrong, best, offset), mask=mask_t)
            tl.store(flags_ptr + 1 + rows, wrong.to(tl.int32), mask=mask_t)
            if tl.max(wrong.to(tl.int32), axis=0) > 0:
                tl.atomic_max(flags_ptr, 1)
            settled = settled & (wrong == 0)
        patch = tl.exp2(shift) - total
        patch = tl.where(patch > 0.0, 0.0, patch)
        if HAS_CAP:  # a capped score is the hyperbolic tangent itself
            patch *= 1.0 - score * score
        out_ptrs = kept_ptr + rows.to(tl.int64) * stride_kt + target
        tl.store(out_ptrs, patch.to(kept_ptr.dtype.element_ty), mask=settled)
    if ENTROPY:
        tl.store(weighted_ptr + rows, weighted, mask=mask_t)
    if SQUARES:
        tl.store(squares_ptr + rows, squares, mask=mask_t)
    if MEAN:
        tl.store(logits_ptr + rows, sums * scale * LN2, mask=mask_t)
