"""The score of each token's target, a gathered dot product in fp32, before any large product.

With a sample of the row's products also an offset near the row's largest logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import interpretable, on_device
from dpo_fast.kernels.product import frame, offset_of, scores

BLOCK_T, BLOCK_D, BLOCK_S = 16, 128, 256


@triton.jit(do_not_specialize=["T"])
def target_product_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    out_ptr,
    sample_ptr,
    offset_ptr,
    T,
    V,
    D,
    S,
    step,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    scale,
    cap_in,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SAMPLE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
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
    if HAS_BIAS:
        total += tl.load(bias_ptr + targets, mask=mask_t, other=0.0).to(tl.float32)
    score, _ = scores(total, None, None, None, cap_in, False, HAS_CAP, NEGATIVE, False)
    tl.store(out_ptr + rows, tl.where(mask_t, score, 0.0), mask=rows < T)
    if SAMPLE:
        best = tl.where(mask_t, score, float("-inf"))
        for start in range(0, S, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)
            mask = (rows < T)[:, None] & (offs_s < S)[None, :]
            in_ptrs = sample_ptr + rows.to(tl.int64)[:, None] * S + offs_s[None, :]
            dots = tl.load(in_ptrs, mask=mask, other=0.0)
            found, _ = scores(
                dots,
                bias_ptr,
                offs_s * step,
                offs_s < S,
                cap_in,
                HAS_BIAS,
                HAS_CAP,
                NEGATIVE,
                False,
            )
            best = tl.maximum(best, tl.max(tl.where(mask, found, float("-inf")), axis=1))
        maximum = scale * best
        tl.store(offset_ptr + rows, offset_of(maximum) if WHOLE else maximum, mask=rows < T)


def target_scores(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: dict
) -> Tensor:
    """Scores at the targets, [T] fp32 (`product.scores`); 0 where a target is not in 0..V-1."""
    score_T = hidden_TD.new_empty(len(targets_T), dtype=torch.float32)
    _launch(hidden_TD, weight_VD, bias_V, targets_T, options, score_T)
    return score_T


def scores_and_offsets(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    options: dict,
    sample_TS: Tensor,
    step: int,
    whole: bool,
) -> tuple[Tensor, Tensor]:
    """`target_scores`, and an offset for each row: just above the largest logit of target and sample.

    sample_TS: products with every step-th column, fp32, contiguous. whole: all of the vocabulary is here;
    otherwise the second result is that largest logit itself, in powers of two.
    """
    score_T = hidden_TD.new_empty(len(targets_T), dtype=torch.float32)
    offset_T = torch.empty_like(score_T)
    _launch(
        hidden_TD, weight_VD, bias_V, targets_T, options, score_T, sample_TS, offset_T, step, whole
    )
    return score_T, offset_T


def _launch(
    hidden_TD,
    weight_VD,
    bias_V,
    targets_T,
    options,
    score_T,
    sample_TS=None,
    offset_T=None,
    step=1,
    whole=True,
) -> None:
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    hidden_TD, weight_VD, bias_V = interpretable(hidden_TD, weight_VD, bias_V)
    if not T:
        return
    with on_device(hidden_TD):
        target_product_kernel[(triton.cdiv(T, BLOCK_T),)](
            hidden_ptr=hidden_TD,
            weight_ptr=weight_VD,
            bias_ptr=bias_V,
            targets_ptr=targets_T,
            out_ptr=score_T,
            sample_ptr=sample_TS,
            offset_ptr=offset_T,
            T=T,
            V=V,
            D=D,
            S=0 if sample_TS is None else sample_TS.shape[1],
            step=step,
            stride_ht=hidden_TD.stride(0),
            stride_hd=hidden_TD.stride(1),
            stride_wv=weight_VD.stride(0),
            stride_wd=weight_VD.stride(1),
            HAS_BIAS=bias_V is not None,
            SAMPLE=sample_TS is not None,
            WHOLE=whole,
            BLOCK_S=BLOCK_S,
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            num_warps=4,
            **frame(**options),
        )
