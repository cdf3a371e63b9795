"""Row sums of z = cap(logit_scale * (h W^T + b)) / temperature, and on request its exponentials.

`rows_kernel` consumes the fp32 accumulator of the product, so a logit is never rounded nor stored. It
reduces the rows of each tile, and with KEEP stores 2^(z - m) against a row offset m that is known before.
`merge_kernel` joins the tiles of a row in a fixed order. Logits and offsets are in powers of two, z / ln 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.alike import Results
from dpo_fast.kernels.device import interpretable, launch, on_device
from dpo_fast.kernels.product import (
    arguments,
    check,
    column_in_tile,
    less,
    offset_of,
    product,
    scores,
    store_tile,
    tile_of,
)
from dpo_fast.kernels.search import choose_tile
from dpo_fast.kernels.target_product import target_scores
from dpo_fast.kernels.tiles import TileConfig, describable, programs, repair_config, say_layouts

MERGE_TOKENS, MERGE_TILES = 32, 64
SUMS = {  # extra: its sum
    "entropy": "weighted",
    "log_sum_p2": "squares",
    "mean_logit": "logits",
    "is_top1": "top",
}
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _reduce(
    score,
    e,
    shifted,
    maximum,
    rows,
    mask_t,
    mask_v,
    partials_ptr,
    pid_v,
    tiles_v,
    T,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Sums of one tile's rows to partials [plane, tile of V, T]; masked columns have e = 0."""
    plane = tiles_v * T.to(tl.int64)
    out_ptrs = partials_ptr + pid_v * T.to(tl.int64) + rows
    tl.store(out_ptrs, maximum, mask=mask_t)
    tl.store(out_ptrs + plane, tl.sum(e, axis=1), mask=mask_t)
    if ENTROPY:
        weighted = tl.sum(e * shifted, axis=1)
        tl.store(out_ptrs + 2 * plane, weighted, mask=mask_t)
    if SQUARES:
        tl.store(out_ptrs + 3 * plane, tl.sum(e * e, axis=1), mask=mask_t)
    if MEAN:
        total = tl.sum(tl.where(mask_v[None, :], score, 0.0), axis=1)
        tl.store(out_ptrs + 4 * plane, total, mask=mask_t)


@triton.jit
def _store_top(score, scale, targets_ptr, top_ptr, rows, mask_t, first_v, BLOCK_V: tl.constexpr):
    """The logits of the targets that this tile has, to compare with the rows' maxima."""
    column = column_in_tile(targets_ptr, rows, mask_t, 0, first_v, BLOCK_V)
    is_target = tl.arange(0, BLOCK_V)[None, :] == column[:, None]
    top = scale * tl.max(tl.where(is_target, score, float("-inf")), axis=1)
    tl.store(top_ptr + rows, top, mask=mask_t & (column >= 0))


@triton.jit
def _rows_tile(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    top_ptr,
    partials_ptr,
    offset_ptr,
    kept,
    mask_t,
    first_t,
    pid_v,
    tiles_v,
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
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    first_v = pid_v * BLOCK_V
    rows = first_t + tl.arange(0, BLOCK_T)
    offs_v = first_v + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    acc = product(
        hidden,
        weight,
        first_t,
        first_v,
        T,
        V,
        D,
        stride_ht,
        stride_hd,
        stride_wv,
        stride_wd,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        EVEN_D,
        TMA,
        PRECISION,
    )
    score, slope = scores(acc, bias_ptr, offs_v, mask_v, cap_in, HAS_BIAS, HAS_CAP, NEGATIVE, KEEP)
    if MASKED:
        score = tl.where(mask_v[None, :], score, float("-inf"))
    maximum = scale * tl.max(score, axis=1)
    if TOP1 and KEEP:
        _store_top(score, scale, targets_ptr, top_ptr, rows, mask_t, first_v, BLOCK_V)
    if KEEP:
        offset = tl.load(offset_ptr + rows, mask=mask_t, other=0.0)
    else:
        offset = offset_of(maximum)
    shifted = less(score, scale, offset[:, None])
    if ENTROPY:  # 0 times -inf would be NaN; 2^-1e4 is 0 as well
        shifted = tl.maximum(shifted, -1e4, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(shifted)
    _reduce(
        score,
        e,
        shifted,
        maximum,
        rows,
        mask_t,
        mask_v,
        partials_ptr,
        pid_v,
        tiles_v,
        T,
        ENTROPY,
        SQUARES,
        MEAN,
    )
    if (
        TOP1 and not KEEP
    ):  # where the fewest values are alive: either place spills in the other's case
        _store_top(score, scale, targets_ptr, top_ptr, rows, mask_t, first_v, BLOCK_V)
    if KEEP:
        if HAS_CAP:
            e *= slope
        if TMA:
            store_tile(kept, e.to(kept.dtype), first_t, first_v, SUBTILES)
        else:
            out_ptrs = kept + rows.to(tl.int64)[:, None] * stride_kt + offs_v[None, :]
            mask = mask_t[:, None] & mask_v[None, :]
            tl.store(out_ptrs, e.to(kept.dtype.element_ty), mask=mask)


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
    SUBTILES: tl.constexpr,
):
    """Sums of every row over every tile, and with KEEP E = 2^(z - offset) (times the cap's slope).

    REPAIR does again the rows that repair_ptr[1:] names, and nothing at once if repair_ptr[0] is 0.
    """
    tiles_t, tiles_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
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
                if tl.max(wrong.to(tl.int32), axis=0) > 0:
                    _rows_tile(
                        hidden,
                        weight,
                        bias_ptr,
                        targets_ptr,
                        top_ptr,
                        partials_ptr,
                        offset_ptr,
                        kept,
                        mask_t,
                        first_t,
                        pid_v,
                        tiles_v,
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
                        HAS_BIAS,
                        HAS_CAP,
                        NEGATIVE,
                        ENTROPY,
                        SQUARES,
                        MEAN,
                        TOP1,
                        KEEP,
                        not EVEN_V and part == PARTS - 1,  # MASKED
                        EVEN_D,
                        TMA,
                        PRECISION,
                        BLOCK_T,
                        BLOCK_V,
                        BLOCK_D,
                        SUBTILES,
                    )
            else:
                _rows_tile(
                    hidden,
                    weight,
                    bias_ptr,
                    targets_ptr,
                    top_ptr,
                    partials_ptr,
                    offset_ptr,
                    kept,
                    mask_t,
                    first_t,
                    pid_v,
                    tiles_v,
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
                    HAS_BIAS,
                    HAS_CAP,
                    NEGATIVE,
                    ENTROPY,
                    SQUARES,
                    MEAN,
                    TOP1,
                    KEEP,
                    not EVEN_V and part == PARTS - 1,  # MASKED
                    EVEN_D,
                    TMA,
                    PRECISION,
                    BLOCK_T,
                    BLOCK_V,
                    BLOCK_D,
                    SUBTILES,
                )


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


class RowPass:
    """A pass over one block of tokens: row sums, and with `kept_TV` the exponentials.

    The constructor launches the kernels; `repair` launches them again.

    sums: by name, [T] fp32, logits and offsets in powers of two.
        offset: m; `offset_T` with `kept_TV`, else just above the maximum.
        maximum: of z.
        shift: the target's logit less m; -inf where the target is not among these columns.
        total: sum 2^(z - m).
        weighted, squares, logits, for the extras that need them: sum 2^(z - m) (z - m),
            sum 2^(2 (z - m)), and sum z in nats.
        logp: of the target, in nats.
        top, for is_top1: the target's logit from the product of its tile, which `maximum` is comparable
            with; -inf where the target is not among these columns.

    Args:
        hidden_TD, weight_VD: fp32, bf16 or fp16, any strides; bias_V: [V], contiguous, or None.
        targets_T: int64, contiguous; values outside 0..V-1 are no target of these columns.
        offset_T, kept_TV: row offsets m, fp32, and where to store 2^(z - m) times the cap's slope.
        score_T: `target_scores` of these tokens, where they are known already.
        largest_shift: given with `kept_TV`, rows whose maximum is further from their offset are done again
            at once, `offset_T` is updated, and E is patched to E' at the targets: `settled`.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        *,
        options: dict,
        extras: tuple[str, ...] = (),
        offset_T: Tensor | None = None,
        kept_TV: Tensor | None = None,
        score_T: Tensor | None = None,
        largest_shift: float | None = None,
        config: TileConfig | None = None,
    ):
        check(hidden_TD, weight_VD, bias_V, targets_T)
        say_layouts("row", hidden=hidden_TD, weight=weight_VD)
        self.kept, self.largest_shift = kept_TV, largest_shift
        self.settled = largest_shift is not None
        self.hidden, self.weight, self.bias, self.store = interpretable(
            hidden_TD, weight_VD, bias_V, kept_TV
        )
        self.targets, self.options = targets_T, options
        if score_T is None:
            score_T = target_scores(hidden_TD, weight_VD, bias_V, targets_T, options)
        self.score = score_T
        (T, D), V = hidden_TD.shape, weight_VD.shape[0]
        names = [SUMS[name] for name in extras if name in SUMS]
        rich = bias_V is not None or bool(options["softcap"]) or not {*names} <= {"weighted", "top"}
        stored = () if kept_TV is None else (self.store,)
        self.config = config or choose_tile(
            "rows",
            hidden_TD.device,
            self.hidden.dtype,
            D,
            V,
            lambda tile: (
                RowPass(
                    hidden_TD,
                    weight_VD,
                    bias_V,
                    targets_T,
                    options=options,
                    extras=extras,
                    offset_T=None if offset_T is None else offset_T.clone(),  # a repair writes it
                    kept_TV=kept_TV,
                    score_T=score_T,
                    largest_shift=largest_shift,
                    config=tile,
                ).results
            ),
            stores=bool(stored),
            entropy="weighted" in names,
            rich=rich,
            described=describable(self.hidden, self.weight, *stored),
        )
        new = lambda *shape: hidden_TD.new_empty(shape, dtype=torch.float32)  # noqa: E731
        self.sums = {name: new(T) for name in ("maximum", "shift", "total", "logp", *names)}
        self.sums["offset"] = new(T) if offset_T is None else offset_T
        if "top" in names:
            self.sums["top"].fill_(-torch.inf)
        self.flags = {
            flag: name in names
            for flag, name in (("ENTROPY", "weighted"), ("SQUARES", "squares"), ("MEAN", "logits"))
        }
        self.even_v = V % self.config.block_v == 0
        self.tiles_v = triton.cdiv(V, self.config.block_v)
        self.partials = new(5 if any(self.flags.values()) else 2, self.tiles_v, T)
        self.flags_T = None
        if self.settled:
            self.flags_T = hidden_TD.new_zeros(1 + T, dtype=torch.int32)
        if T:
            self._launch(self.config, None)
            if self.settled:
                self._launch(repair_config(self.config), self.flags_T)

    def results(self) -> Results:
        """What other tiles give as well, but for rounding: logits in powers of two, sums per total."""
        sums, total_T = self.sums, self.sums["total"]
        # Near 1e4 products in fp32 are off by 1e-3.
        size_T = 1 + sums["maximum"].abs().nan_to_num(0.0, 0.0, 0.0) / 256
        values = {name: (sums[name], size_T) for name in ("maximum", "logp", "top") if name in sums}
        values["log total"] = sums["offset"] + total_T.log2(), size_T
        if "weighted" in sums:
            values["entropy"] = total_T.log2() - sums["weighted"] / total_T, size_T
        if "squares" in sums:
            values["log sum p^2"] = sums["squares"].log2() - 2 * total_T.log2(), size_T
        if "logits" in sums:
            values["mean logit"] = sums["logits"] / len(self.weight), size_T
        return Results(values, self.kept, total_T)

    def repair(self, wrong_T: Tensor) -> None:
        """Do again the rows that `wrong_T` (bool) marks, against the offsets as they are now.

        Waits for nothing: the kernels look for such rows themselves, and return if there are none.
        """
        if len(wrong_T):
            flags = torch.cat([wrong_T.any()[None], wrong_T]).to(torch.int32)
            self._launch(repair_config(self.config), flags)

    def _launch(self, config: TileConfig, repair: Tensor | None) -> None:
        T, V = len(self.targets), self.weight.shape[0]
        tiles = triton.cdiv(T, config.block_t) * self.tiles_v
        shared = {"T": T, "V": V, "repair_ptr": repair, "partials_ptr": self.partials, **self.flags}
        shared |= {"targets_ptr": self.targets, "offset_ptr": self.sums["offset"]}
        shared |= {"KEEP": self.kept is not None, "REPAIR": repair is not None}
        operands = arguments(
            self.hidden, self.weight, self.bias, config, stored=self.store, options=self.options
        )
        operands["kept"], operands["stride_kt"] = operands.pop("stored"), operands.pop("stride_st")
        with on_device(self.hidden):
            launch(
                rows_kernel,
                (programs(config, tiles, self.hidden.device),),
                top_ptr=self.sums.get("top"),
                TOP1="top" in self.sums,
                EVEN_V=self.even_v,
                **operands,
                **shared,
            )
            launch(
                merge_kernel,
                (triton.cdiv(T, MERGE_TOKENS),),
                maximum_ptr=self.sums["maximum"],
                total_ptr=self.sums["total"],
                weighted_ptr=self.sums.get("weighted"),
                squares_ptr=self.sums.get("squares"),
                logits_ptr=self.sums.get("logits"),
                score_ptr=self.score,
                shift_ptr=self.sums["shift"],
                logp_ptr=self.sums["logp"],
                kept_ptr=self.store if self.settled else None,
                flags_ptr=self.flags_T,
                scale=operands["scale"],
                largest_shift=self.largest_shift or 0.0,
                stride_kt=operands["stride_kt"],
                HAS_CAP=operands["HAS_CAP"],
                SETTLE=self.settled,
                tiles_v=self.tiles_v,
                BLOCK_T=MERGE_TOKENS,
                BLOCK_S=MERGE_TILES,
                num_warps=4,
                **shared,
            )
        if self.store is not self.kept:
            self.kept.copy_(self.store)
