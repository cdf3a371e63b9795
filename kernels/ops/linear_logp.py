"""Row sums of z = cap(logit_scale * (h W^T + b)) / temperature, and on request its exponentials.

`rows_kernel` consumes the fp32 accumulator of the product, so a logit is never rounded nor stored. It
reduces the rows of each tile, and with KEEP stores exp(z - m) against a row offset m that is known before.
`merge_kernel` joins the tiles of a row in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import interpretable, on_device
from dpo_fast.kernels.product import arguments, check, finite, logits, product, tile_of
from dpo_fast.kernels.search import choose_tile
from dpo_fast.kernels.tiles import TileConfig, describable, programs, repair_config

MERGE_TOKENS, MERGE_TILES = 32, 64
SUMS = {"entropy": "weighted", "log_sum_p2": "squares", "mean_logit": "logits"}  # extra: its sum


@triton.jit
def _reduce(
    z,
    e,
    maximum,
    offset,
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
    """Sums of one tile's rows to partials [plane, tile of V, T]; masked columns hold z = -inf, e = 0."""
    plane = tiles_v * T.to(tl.int64)
    out_ptrs = partials_ptr + pid_v * T.to(tl.int64) + rows
    tl.store(out_ptrs, maximum, mask=mask_t)
    tl.store(out_ptrs + plane, tl.sum(e, axis=1), mask=mask_t)
    if ENTROPY:
        weighted = tl.sum(tl.where(e > 0, e * (z - offset[:, None]), 0.0), axis=1)
        tl.store(out_ptrs + 2 * plane, weighted, mask=mask_t)
    if SQUARES:
        tl.store(out_ptrs + 3 * plane, tl.sum(e * e, axis=1), mask=mask_t)
    if MEAN:
        total = tl.sum(tl.where(mask_v[None, :], z, 0.0), axis=1)
        tl.store(out_ptrs + 4 * plane, total, mask=mask_t)


@triton.jit
def _rows_tile(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    target_ptr,
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
    factor,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    z, slope = logits(
        acc, bias_ptr, offs_v, mask_v, factor, cap_in, cap_out, HAS_BIAS, HAS_CAP, HAS_FACTOR, KEEP
    )
    z = tl.where(mask_v[None, :], z, float("-inf"))
    targets = tl.load(targets_ptr + rows, mask=mask_t, other=-1)
    inside = (targets >= first_v) & (targets < tl.minimum(first_v + BLOCK_V, V))
    target = tl.sum(tl.where(offs_v[None, :] == targets[:, None], z, 0.0), axis=1)
    tl.store(target_ptr + rows, target, mask=mask_t & inside)
    maximum = tl.max(z, axis=1)
    if KEEP:
        offset = tl.load(offset_ptr + rows, mask=mask_t, other=0.0)
    else:
        offset = finite(maximum)
    e = tl.exp(z - offset[:, None])
    _reduce(
        z,
        e,
        maximum,
        offset,
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
    if KEEP:
        if HAS_CAP:
            e *= slope
        if TMA:
            kept.store([first_t, first_v], e.to(kept.dtype))
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
    target_ptr,
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
    factor,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    REPAIR: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Sums of every row over every tile, and with KEEP E = exp(z - offset) (times the cap's slope).

    REPAIR does again the rows that repair_ptr[1:] names, and nothing at once if repair_ptr[0] is 0.
    """
    tiles_t, tiles_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    tiles = tiles_t * tiles_v
    if REPAIR:
        tiles = tl.where(tl.load(repair_ptr) != 0, tiles, 0)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_t, pid_v = tile_of(index, tiles_t, tiles_v, GROUP_T)
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
                    target_ptr,
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
                    factor,
                    cap_in,
                    cap_out,
                    HAS_BIAS,
                    HAS_CAP,
                    HAS_FACTOR,
                    ENTROPY,
                    SQUARES,
                    MEAN,
                    KEEP,
                    EVEN_D,
                    TMA,
                    PRECISION,
                    BLOCK_T,
                    BLOCK_V,
                    BLOCK_D,
                )
        else:
            _rows_tile(
                hidden,
                weight,
                bias_ptr,
                targets_ptr,
                target_ptr,
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
                factor,
                cap_in,
                cap_out,
                HAS_BIAS,
                HAS_CAP,
                HAS_FACTOR,
                ENTROPY,
                SQUARES,
                MEAN,
                KEEP,
                EVEN_D,
                TMA,
                PRECISION,
                BLOCK_T,
                BLOCK_V,
                BLOCK_D,
            )


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partials_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    squares_ptr,
    sum_ptr,
    repair_ptr,
    T,
    tiles_v,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    REPAIR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the tiles of each row, in order.

    Sums are against the row's offset with KEEP, where all tiles share it. Without, each tile had its own
    maximum, and sums are against the row's.
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
    offset = finite(maximum)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted, squares, sums = total, total, total
    for start in range(0, tiles_v, BLOCK_S):
        mask = (start + splits < tiles_v)[:, None] & mask_t[None, :]
        in_ptrs = partials_ptr + (start + splits).to(tl.int64)[:, None] * T + rows[None, :]
        part_total = tl.load(in_ptrs + plane, mask=mask, other=0.0)
        gain, shift = 1.0, 0.0
        if not KEEP:
            part_max = finite(tl.load(in_ptrs, mask=mask, other=float("-inf")))
            # A tile of -inf alone has offset 0 and sums of 0, whatever the row's maximum is.
            shift = tl.where(part_total > 0, part_max - offset[None, :], 0.0)
            gain = tl.exp(shift)
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
    tl.store(maximum_ptr + rows, maximum, mask=mask_t)
    tl.store(total_ptr + rows, total, mask=mask_t)
    if ENTROPY:
        tl.store(weighted_ptr + rows, weighted, mask=mask_t)
    if SQUARES:
        tl.store(squares_ptr + rows, squares, mask=mask_t)
    if MEAN:
        tl.store(sum_ptr + rows, sums, mask=mask_t)


class RowPass:
    """A pass over one block of tokens: row sums, and with `kept_TV` the exponentials.

    The constructor launches the kernels; `repair` launches them again.

    sums: by name, [T] fp32. m is `offset_T` with `kept_TV`, else the maximum (0 for a row of -inf).
        maximum: of z.
        target: the target's logit; 0 where the target is not among these columns.
        total: sum exp(z - m).
        weighted: sum exp(z - m) (z - m), squares: sum exp(z - m)^2, logits: sum z; for the extras that
            need them.

    Args:
        hidden_TD, weight_VD: fp32, bf16 or fp16, any strides; bias_V: [V], contiguous, or None.
        targets_T: int64, contiguous; values outside 0..V-1 are no target of these columns.
        offset_T, kept_TV: row offsets m, fp32, and where to store exp(z - m) times the cap's slope.
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
        config: TileConfig | None = None,
    ):
        check(hidden_TD, weight_VD, bias_V, targets_T)
        self.offset, self.kept = offset_T, kept_TV
        self.hidden, self.weight, self.bias, self.store = interpretable(
            hidden_TD, weight_VD, bias_V, kept_TV
        )
        self.targets, self.options = targets_T, options
        (T, D), V = hidden_TD.shape, weight_VD.shape[0]
        names = [SUMS[name] for name in extras if name in SUMS]
        rich = bias_V is not None or bool(options["softcap"]) or not {*names} <= {"weighted"}
        stored = () if kept_TV is None else (self.store,)
        self.config = config or choose_tile(
            "rows",
            hidden_TD.device,
            self.hidden.dtype,
            D,
            V,
            lambda tile: RowPass(
                hidden_TD,
                weight_VD,
                bias_V,
                targets_T,
                options=options,
                extras=extras,
                offset_T=offset_T,
                kept_TV=kept_TV,
                config=tile,
            ),
            stores=bool(stored),
            entropy="weighted" in names,
            rich=rich,
            described=describable(self.hidden, self.weight, *stored),
        )
        new = lambda *shape: hidden_TD.new_empty(shape, dtype=torch.float32)  # noqa: E731
        self.sums = {name: new(T) for name in ("maximum", "total", *names)}
        self.sums["target"] = hidden_TD.new_zeros(T, dtype=torch.float32)
        self.flags = {
            flag: name in names
            for flag, name in (("ENTROPY", "weighted"), ("SQUARES", "squares"), ("MEAN", "logits"))
        }
        self.tiles_v = triton.cdiv(V, self.config.block_v)
        self.partials = new(5 if names else 2, self.tiles_v, T)
        if T:
            self._launch(self.config, None)

    def repair(self, wrong_T: Tensor) -> None:
        """Do again the rows that `wrong_T` (bool) marks, against the offsets as they are now.

        Waits for nothing: the kernels look for such rows themselves, and return if there are none.
        """
        if len(wrong_T):
            flags = torch.cat([wrong_T.any()[None], wrong_T]).to(torch.int8)
            self._launch(repair_config(self.config), flags)

    def _launch(self, config: TileConfig, repair: Tensor | None) -> None:
        T, V = len(self.targets), self.weight.shape[0]
        tiles = triton.cdiv(T, config.block_t) * self.tiles_v
        shared = {"T": T, "repair_ptr": repair, "partials_ptr": self.partials, **self.flags}
        shared |= {"KEEP": self.kept is not None, "REPAIR": repair is not None}
        operands = arguments(
            self.hidden, self.weight, self.bias, config, stored=self.store, **self.options
        )
        operands["kept"], operands["stride_kt"] = operands.pop("stored"), operands.pop("stride_st")
        with on_device(self.hidden):
            rows_kernel[(programs(config, tiles, self.hidden.device),)](
                targets_ptr=self.targets,
                target_ptr=self.sums["target"],
                offset_ptr=self.offset,
                V=V,
                **operands,
                **shared,
            )
            merge_kernel[(triton.cdiv(T, MERGE_TOKENS),)](
                maximum_ptr=self.sums["maximum"],
                total_ptr=self.sums["total"],
                weighted_ptr=self.sums.get("weighted"),
                squares_ptr=self.sums.get("squares"),
                sum_ptr=self.sums.get("logits"),
                tiles_v=self.tiles_v,
                BLOCK_T=MERGE_TOKENS,
                BLOCK_S=MERGE_TILES,
                num_warps=4,
                **shared,
            )
        if self.store is not self.kept:
            self.kept.copy_(self.store)
