"""Log-probabilities of targets from logits that already exist: forward and backward, fp32 inside.

One read of the logits forward; one read and one write backward. No fp32 copy of them is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import interpretable, on_device

BLOCK_V = 4096
INTERPRETER_BLOCK_V = 64  # small enough for tests to see several blocks
NUM_WARPS = 8


@triton.jit
def forward_kernel(
    logits_ptr,
    targets_ptr,
    logp_ptr,
    norm_ptr,
    V,
    stride_t,
    stride_v,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    """One row: online maximum and sum over blocks of the vocabulary.

    The temperature scales distances from the maximum. A device fuses its product with what comes after: a
    scaled target less a maximum that was rounded is not 0 where they are one logit, and may be above it.
    """
    pid_t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_t * stride_t
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(
            row_ptr + offs_v.to(tl.int64) * stride_v, mask=offs_v < V, other=float("-inf")
        ).to(tl.float32)
        previous, maximum = maximum, tl.maximum(maximum, tl.max(x, axis=0))
        # Only -inf so far: any finite offset keeps the sum at 0, where -inf would make NaN.
        offset = tl.where(maximum == float("-inf"), 0.0, maximum)
        total *= tl.exp((previous - offset) * inverse_temperature)
        total += tl.sum(tl.exp((x - offset) * inverse_temperature), axis=0)
    target = tl.load(targets_ptr + pid_t)
    x_target = tl.load(row_ptr + target * stride_v).to(tl.float32)
    log_total = tl.log(total)  # of 1 or more
    tl.store(logp_ptr + pid_t, (x_target - maximum) * inverse_temperature - log_total)
    tl.store(norm_ptr + 2 * pid_t, maximum)
    tl.store(norm_ptr + 2 * pid_t + 1, log_total)


@triton.jit
def backward_kernel(
    logits_ptr,
    targets_ptr,
    norm_ptr,
    grad_ptr,
    out_ptr,
    V,
    stride_t,
    stride_v,
    stride_ot,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    """c (1[v = y] - p) / temperature for one block of one row, p from distances as in `forward_kernel`."""
    pid_t = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    x = tl.load(
        logits_ptr + pid_t * stride_t + offs_v.to(tl.int64) * stride_v, mask=mask_v, other=0.0
    ).to(tl.float32)
    maximum, log_total = tl.load(norm_ptr + 2 * pid_t), tl.load(norm_ptr + 2 * pid_t + 1)
    scale = tl.load(grad_ptr + pid_t) * inverse_temperature
    hit = tl.where(offs_v == tl.load(targets_ptr + pid_t), 1.0, 0.0)
    g = scale * (hit - tl.exp((x - maximum) * inverse_temperature - log_total))
    tl.store(out_ptr + pid_t * stride_ot + offs_v, g.to(out_ptr.dtype.element_ty), mask=mask_v)


def _block(logits_TV: Tensor) -> int:
    largest = BLOCK_V if logits_TV.is_cuda else INTERPRETER_BLOCK_V
    return min(largest, triton.next_power_of_2(logits_TV.shape[1]))


def _check(logits_TV: Tensor, targets_T: Tensor) -> None:
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)}, targets {tuple(targets_T.shape)}")
    if logits_TV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits_TV.dtype}: the kernels take fp32, bf16 and fp16")
    if not targets_T.is_contiguous():
        raise ValueError("targets must be contiguous")


def forward(logits_TV: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logp [T], and what normalises each row [T, 2]: its largest logit, and the logarithm of the sum of
    exp((logit - largest) / temperature). fp32. Logits have any strides."""
    _check(logits_TV, targets_T)
    T, V = logits_TV.shape
    logp_T = logits_TV.new_empty(T, dtype=torch.float32)
    norm_T2 = logits_TV.new_empty(T, 2, dtype=torch.float32)
    if T:
        with on_device(logits_TV):
            forward_kernel[(T,)](
                logits_ptr=logits_TV,
                targets_ptr=targets_T,
                logp_ptr=logp_T,
                norm_ptr=norm_T2,
                V=V,
                stride_t=logits_TV.stride(0),
                stride_v=logits_TV.stride(1),
                inverse_temperature=1 / temperature,
                BLOCK_V=_block(logits_TV),
                num_warps=NUM_WARPS,
            )
    return logp_T, norm_T2


def backward(
    grad_T: Tensor,
    logits_TV: Tensor,
    targets_T: Tensor,
    norm_T2: Tensor,
    temperature: float,
    out_TV: Tensor,
) -> None:
    """Write dL/dlogits to `out_TV`, whose columns are contiguous. `grad_T`: contiguous fp32."""
    _check(logits_TV, targets_T)
    T, V = logits_TV.shape
    if T:
        block = _block(logits_TV)
        (g_TV,) = interpretable(out_TV)
        with on_device(logits_TV):
            backward_kernel[(T, triton.cdiv(V, block))](
                logits_ptr=logits_TV,
                targets_ptr=targets_T,
                norm_ptr=norm_T2,
                grad_ptr=grad_T,
                out_ptr=g_TV,
                V=V,
                stride_t=logits_TV.stride(0),
                stride_v=logits_TV.stride(1),
                stride_ot=g_TV.stride(0),
                inverse_temperature=1 / temperature,
                BLOCK_V=block,
                num_warps=NUM_WARPS,
            )
        if g_TV is not out_TV:
            out_TV.copy_(g_TV)
