"""Rows times a factor each, rounded once: the glue between products, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import interpretable, on_device

BLOCK_D = 1024


@triton.jit
def scale_rows_kernel(
    in_ptr,
    slope_ptr,
    total_ptr,
    out_ptr,
    D,
    stride_it,
    stride_id,
    stride_ot,
    factor,
    HAS_SLOPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = factor / tl.load(total_ptr + row)
    if HAS_SLOPE:
        scale *= tl.load(slope_ptr + row)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        in_ptrs = in_ptr + row * stride_it + offs_d.to(tl.int64) * stride_id
        x = tl.load(in_ptrs, mask=mask_d, other=0.0).to(tl.float32) * scale
        tl.store(out_ptr + row * stride_ot + offs_d, x.to(out_ptr.dtype.element_ty), mask=mask_d)


def scale_rows(
    x_TD: Tensor, total_T: Tensor, out_TD: Tensor, *, factor: float, slope_T: Tensor | None = None
) -> None:
    """out = factor slope / total x, slope 1 if None. x: any strides; out: rows of contiguous elements;
    total and slope: contiguous fp32."""
    T, D = x_TD.shape
    given, stored = interpretable(x_TD, out_TD)
    if T:
        with on_device(x_TD):
            scale_rows_kernel[(T,)](
                in_ptr=given,
                slope_ptr=slope_T,
                total_ptr=total_T,
                out_ptr=stored,
                D=D,
                stride_it=given.stride(0),
                stride_id=given.stride(1),
                stride_ot=stored.stride(0),
                factor=factor,
                HAS_SLOPE=slope_T is not None,
                BLOCK_D=BLOCK_D if x_TD.is_cuda else min(BLOCK_D, triton.next_power_of_2(D)),
                num_warps=4,
            )
    if stored is not out_TD:
        out_TD.copy_(stored)
