"""Gradient tiles of `linear_logp`: dL/d(h.w + b) from logits made again, for what was not kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.alike import Results
from dpo_fast.kernels.device import interpretable, launch, on_device
from dpo_fast.kernels.product import (
    Operands,
    Tile,
    arguments,
    check,
    column_in_tile,
    less,
    product,
    scores,
    tile_of,
)
from dpo_fast.kernels.search import choose_tile
from dpo_fast.kernels.tiles import TileConfig, describable, programs, say_layouts


@triton.jit(do_not_specialize=["T", "V", "first_column"])
def gradient_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    offset_ptr,
    hit_ptr,
    per_p_ptr,
    out,
    column_sum_ptr,
    T,
    V,
    D,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_ot,
    scale,
    cap_in,
    first_column,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """g = (hit 1[v = y] - per_p 2^(z - offset)) slope, rounded once; hit = c, per_p = c / total."""
    tiles_t, tiles_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    x = Operands(hidden, weight, T, V, D, stride_ht, stride_hd, stride_wv, stride_wd)
    TILE: tl.constexpr = Tile(BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D, TMA, PRECISION)
    for index in tl.range(tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        pid_t, pid_v = tile_of(index, tiles_t, tiles_v, GROUP_T)
        first_t, first_v = pid_t * BLOCK_T, pid_v * BLOCK_V
        rows = first_t + tl.arange(0, BLOCK_T)
        offs_v = first_v + tl.arange(0, BLOCK_V)
        mask_t, mask_v = rows < T, offs_v < V
        acc = product(x, first_t, first_v, TILE)
        score, slope = scores(
            acc, bias_ptr, offs_v, mask_v, cap_in, HAS_BIAS, HAS_CAP, NEGATIVE, True
        )
        offset = tl.load(offset_ptr + rows, mask=mask_t, other=0.0)
        per_p = tl.load(per_p_ptr + rows, mask=mask_t, other=0.0)
        hit = tl.load(hit_ptr + rows, mask=mask_t, other=0.0)
        column = column_in_tile(targets_ptr, rows, mask_t, first_column, first_v, BLOCK_V)
        g = -per_p[:, None] * tl.exp2(less(score, scale, offset[:, None]))
        is_target = tl.arange(0, BLOCK_V)[None, :] == column[:, None]
        g = tl.where(is_target, g + hit[:, None], g) * slope
        if COLUMN_SUMS:
            sums = tl.sum(tl.where(mask_t[:, None], g, 0.0), axis=0)
            tl.store(column_sum_ptr + pid_t.to(tl.int64) * V + offs_v, sums, mask=mask_v)
        if TMA:
            out.store([first_t, first_v], g.to(out.dtype))
        else:
            out_ptrs = out + rows.to(tl.int64)[:, None] * stride_ot + offs_v[None, :]
            mask = mask_t[:, None] & mask_v[None, :]
            tl.store(out_ptrs, g.to(out.dtype.element_ty), mask=mask)


def gradient_tile(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    offset_T: Tensor,
    hit_T: Tensor,
    per_p_T: Tensor,
    out_TV: Tensor,
    *,
    options: dict,
    first_column: int = 0,
    column_sums: bool = False,
    config: TileConfig | None = None,
) -> Tensor | None:
    """Write g = dL/d(h.w + b) of these rows and columns to `out_TV`. Returns its column sums, or None.

    g = (hit 1[v = y] - per_p 2^(z - offset)) slope.

    weight_VD, bias_V: columns of the vocabulary from `first_column` on; targets count from column 0.
    offset_T, hit_T, per_p_T: contiguous fp32.
    column_sums: whether they are wanted, in fp32.
    """
    check(hidden_TD, weight_VD, bias_V, targets_T)
    say_layouts("gradient", hidden=hidden_TD, weight=weight_VD)
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    given = hidden_TD, weight_VD, bias_V, targets_T, offset_T, hit_T, per_p_T, out_TV
    hidden_TD, weight_VD, bias_V, g_TV = interpretable(hidden_TD, weight_VD, bias_V, out_TV)
    how = {"options": options, "first_column": first_column, "column_sums": column_sums}
    config = config or choose_tile(
        "gradient",
        hidden_TD.device,
        hidden_TD.dtype,
        D,
        V,
        lambda tile: _results(gradient_tile(*given, **how, config=tile), out_TV, hit_T),
        stores=True,
        rich=bias_V is not None or bool(options["softcap"]) or column_sums,
        described=describable(hidden_TD, weight_VD, g_TV),
    )
    tiles_t = triton.cdiv(T, config.block_t)
    sums = hidden_TD.new_empty((tiles_t, V), dtype=torch.float32) if column_sums else None
    operands = arguments(hidden_TD, weight_VD, bias_V, config, stored=g_TV, options=options)
    operands["out"], operands["stride_ot"] = operands.pop("stored"), operands.pop("stride_st")
    tiles = tiles_t * triton.cdiv(V, config.block_v)
    with on_device(hidden_TD):
        launch(
            gradient_kernel,
            (programs(config, tiles, hidden_TD.device),),
            targets_ptr=targets_T,
            offset_ptr=offset_T,
            hit_ptr=hit_T,
            per_p_ptr=per_p_T,
            column_sum_ptr=sums,
            T=T,
            V=V,
            first_column=first_column,
            COLUMN_SUMS=column_sums,
            **operands,
        )
    if g_TV is not out_TV:
        out_TV.copy_(g_TV)
    return None if sums is None else sums.sum(0)


def _results(sums_V: Tensor | None, out_TV: Tensor, hit_T: Tensor) -> Callable[[], Results]:
    """What other tiles give as well: the absolute values of a row add up to 2 |hit| at most."""

    def read() -> Results:
        size_T = 2 * hit_T.abs()
        values = {} if sums_V is None else {"column sums": (sums_V, size_T.sum())}
        return Results(values, out_TV, size_T)

    return read
