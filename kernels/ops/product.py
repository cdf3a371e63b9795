"""What the product kernels share: order of the tiles, product, logits, and their arguments.

Logits and offsets are in powers of two, so that an exponential is one fused multiply-add and one
instruction of the special-function unit: 2^(scale * score - offset).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.tiles import TileConfig

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_of(index, tiles_t, tiles_v, GROUP_T: tl.constexpr):
    """(pid_t, pid_v). Token tiles vary fastest in a group, so that running programs share operands."""
    first = index // (GROUP_T * tiles_v) * GROUP_T
    size = tl.minimum(tiles_t - first, GROUP_T)
    inside = index % (GROUP_T * tiles_v)
    return first + inside % size, inside // size


class Operands(NamedTuple):
    """hidden [T, D] and weight [V, D]: descriptors with TMA, pointers without."""

    hidden: tl.tensor
    weight: tl.tensor
    T: tl.tensor
    V: tl.tensor
    D: tl.tensor
    stride_ht: tl.tensor
    stride_hd: tl.tensor
    stride_wv: tl.tensor
    stride_wd: tl.tensor


class Tile(NamedTuple):
    """How a product is cut and loaded."""

    BLOCK_T: tl.constexpr
    BLOCK_V: tl.constexpr
    BLOCK_D: tl.constexpr
    EVEN_D: tl.constexpr
    TMA: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def product(x, first_t, first_v, TILE: tl.constexpr):
    """h W^T of one tile in fp32. x: Operands; TILE: a Tile.

    Past the ends a descriptor gives zeros; a pointer reads the last row again, so that the hot loads
    carry no mask.
    """
    acc = tl.zeros((TILE.BLOCK_T, TILE.BLOCK_V), dtype=tl.float32)
    if TILE.TMA:
        for start in range(0, x.D, TILE.BLOCK_D):
            h = x.hidden.load([first_t, start])
            w = x.weight.load([first_v, start])
            acc = tl.dot(h, w.T, acc, input_precision=TILE.PRECISION)
    else:
        rows = tl.minimum(first_t + tl.arange(0, TILE.BLOCK_T), x.T - 1).to(tl.int64)
        columns = tl.minimum(first_v + tl.arange(0, TILE.BLOCK_V), x.V - 1).to(tl.int64)
        offs_d = tl.arange(0, TILE.BLOCK_D)
        along_d = offs_d.to(tl.int64)
        h_ptrs = x.hidden + rows[:, None] * x.stride_ht + along_d[None, :] * x.stride_hd
        w_ptrs = x.weight + columns[None, :] * x.stride_wv + along_d[:, None] * x.stride_wd
        for start in range(0, x.D, TILE.BLOCK_D):
            if TILE.EVEN_D:
                h = tl.load(h_ptrs)
                w = tl.load(w_ptrs)
            else:
                mask_d = offs_d < x.D - start
                h = tl.load(h_ptrs, mask=mask_d[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=mask_d[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision=TILE.PRECISION)
            h_ptrs += TILE.BLOCK_D * x.stride_hd
            w_ptrs += TILE.BLOCK_D * x.stride_wd
    return acc


@triton.jit
def scores(
    acc,
    bias_ptr,
    offs_v,
    mask_v,
    cap_in,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
):
    """Scores y and the cap's slope: a logit in powers of two is scale * y, and scale is positive.

    y = acc + b, its negative where logit_scale is negative, or tanh(cap_in (acc + b)).
    """
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    slope = 1.0
    if HAS_CAP:
        x = acc * cap_in
        # exp of a non-positive number never overflows; the slope 1 - tanh^2 has no cancellation.
        e = tl.exp(-2.0 * tl.abs(x))
        magnitude = (1.0 - e) / (1.0 + e)
        score = tl.where(x < 0, -magnitude, magnitude)
        if WITH_SLOPE:
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif NEGATIVE:
        score = -acc
    else:
        score = acc
    return score, slope


@triton.jit
def less(score, scale, offset):
    """scale * score - offset, rounded once: near 1e4 a rounded product is off by 3e-4 nats.

    Every distance from a row's offset goes through here, the target's too.
    """
    if INTERPRETED:  # the interpreter rounds twice; the product of two fp32 is exact in fp64
        return (score.to(tl.float64) * scale - offset).to(tl.float32)
    return tl.fma(score, scale, -offset)


@triton.jit
def column_in_tile(targets_ptr, rows, mask_t, first_column, first_v, BLOCK_V: tl.constexpr):
    """The target's column within this tile as int32, -1 where it has none: comparing 64-bit columns
    costs three times as much."""
    column = tl.load(targets_ptr + rows, mask=mask_t, other=-1) - first_column - first_v
    return tl.where((column >= 0) & (column < BLOCK_V), column, -1).to(tl.int32)


@triton.jit
def offset_of(maximum):
    """An offset for sums up to this maximum: above it by 2^-22 of its size.

    `less` does not round the product, so that the largest logit itself could exceed its rounded value, by
    enough to overflow where masks are of the order of -1e30. A row that has seen only -inf gets offset 0:
    2^(-inf - 0) is 0, 2^(-inf + inf) is NaN.
    """
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    # An explicit fma: fused with the product behind `maximum`, the sum would differ from kernel to kernel.
    return tl.fma(tl.abs(finite), 2.0**-22, finite)


def frame(logit_scale: float, softcap: float | None, temperature: float) -> dict:
    """Keyword arguments that say what a logit is, for every kernel that makes one."""
    largest = softcap or abs(logit_scale)
    return {
        "scale": largest / temperature / math.log(2),
        "cap_in": logit_scale / softcap if softcap else 0.0,
        "HAS_CAP": bool(softcap),
        "NEGATIVE": logit_scale < 0 and not softcap,
    }


def check(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor) -> None:
    """Raises ValueError for operands that the kernels would misread."""
    T, D = hidden_TD.shape
    if weight_VD.shape[1] != D or targets_T.shape != (T,) or targets_T.stride() not in ((1,), (0,)):
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and contiguous "
            f"targets {tuple(targets_T.shape)} do not fit"
        )
    if hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden_TD.dtype}: the kernels take fp32, bf16 and fp16")
    if hidden_TD.dtype != weight_VD.dtype or (bias_V is not None and not bias_V.is_contiguous()):
        raise ValueError("hidden and weight must share a dtype, and the bias must be contiguous")


def arguments(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    config: TileConfig,
    *,
    stored: Tensor | None,
    options: dict,
) -> dict:
    """Keyword arguments of both product kernels. stored: the [T, V] tensor that they write."""
    block_t, block_v, block_d = config.block_t, config.block_v, config.block_d
    return {
        "hidden": _operand(hidden_TD, (block_t, block_d), config.tma),
        "weight": _operand(weight_VD, (block_v, block_d), config.tma),
        "stored": None if stored is None else _operand(stored, (block_t, block_v), config.tma),
        "bias_ptr": bias_V,
        "D": hidden_TD.shape[1],
        "stride_ht": hidden_TD.stride(0),
        "stride_hd": hidden_TD.stride(1),
        "stride_wv": weight_VD.stride(0),
        "stride_wd": weight_VD.stride(1),
        "stride_st": None if stored is None else stored.stride(0),
        **frame(**options),
        "HAS_BIAS": bias_V is not None,
        "EVEN_D": config.tma or hidden_TD.shape[1] % block_d == 0,
        "TMA": config.tma,
        "PRECISION": "ieee" if hidden_TD.dtype == torch.float32 else "tf32",
        "BLOCK_T": block_t,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "GROUP_T": config.group_t,
        # One loop over tiles and D, so that a tile's first loads start during the last epilogue.
        "FLATTEN": config.tma and config.per_sm > 0,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _operand(tensor: Tensor, block: tuple[int, int], tma: bool):
    if not tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))
