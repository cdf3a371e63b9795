"""h_t . w_y for the target y of each token: a gathered dot product in fp32, before any large product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import interpretable, on_device

BLOCK_T, BLOCK_D = 16, 128


@triton.jit(do_not_specialize=["T"])
def target_product_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    out_ptr,
    T,
    V,
    D,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets = tl.load(targets_ptr + rows, mask=rows < T, other=-1)
    mask_t = (targets >= 0) & (targets < V)
    h_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_ht
    w_ptrs = weight_ptr + targets.to(tl.int64)[:, None] * stride_wv
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = mask_t[:, None] & (offs_d < D)[None, :]
        h = tl.load(h_ptrs + offs_d[None, :] * stride_hd, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptrs + offs_d[None, :] * stride_wd, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(h * w, axis=1)
    tl.store(out_ptr + rows, total, mask=rows < T)


def target_product(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """h_t . w_y, [T] fp32; 0 where the target is not in 0..V-1."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    out_T = hidden_TD.new_empty(T, dtype=torch.float32)
    hidden_TD, weight_VD = interpretable(hidden_TD, weight_VD)
    if T:
        with on_device(hidden_TD):
            target_product_kernel[(triton.cdiv(T, BLOCK_T),)](
                hidden_ptr=hidden_TD,
                weight_ptr=weight_VD,
                targets_ptr=targets_T,
                out_ptr=out_T,
                T=T,
                V=V,
                D=D,
                stride_ht=hidden_TD.stride(0),
                stride_hd=hidden_TD.stride(1),
                stride_wv=weight_VD.stride(0),
                stride_wd=weight_VD.stride(1),
                BLOCK_T=BLOCK_T,
                BLOCK_D=BLOCK_D,
                num_warps=4,
            )
    return out_T
