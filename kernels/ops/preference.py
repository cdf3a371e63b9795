"""Token log-probabilities of pairs to sequence sums, rewards, a weighted sum of losses, and slopes.

One program per pair, one launch. Sums and losses are fp64: a pair has few transcendental functions,
and a device's fp32 logarithm is off by 1e-7 near 1, where pairs that are told apart have their loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.device import on_device

BLOCK = 1024
INTERPRETER_BLOCK = 16  # small enough for tests to see several blocks
NUM_WARPS = 4

# Each loss gives its value and its slopes by lw and by ll, in fp64. As in the table of losses: lw, ll
# are the log-probabilities of chosen and rejected, a, b their log-ratios to the reference, nw, nl their
# tokens. A new loss is a function here, a branch in `_loss` and `kernel=True` in the table.


@triton.jit
def _smoothed(x, right, wrong):
    """-right LS(x) - wrong LS(-x) and its slope by x, LS the log-sigmoid."""
    e = tl.exp(-tl.abs(x))  # of a non-positive number: never overflows
    log_total = tl.log(1.0 + e)
    value = right * (log_total - tl.minimum(x, 0.0)) + wrong * (log_total + tl.maximum(x, 0.0))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    up, down = tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)
    return value, wrong * up - right * down


@triton.jit
def _sigmoid(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    value, slope = _smoothed(beta * (a - b), 1.0 - eps, eps)
    return value, beta * slope, -beta * slope


@triton.jit
def _ipo(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    uw = 1.0 / nw if LENGTH_AVERAGE else 1.0
    ul = 1.0 / nl if LENGTH_AVERAGE else 1.0
    gap = a * uw - b * ul - 0.5 / beta
    return gap * gap, 2.0 * gap * uw, -2.0 * gap * ul


@triton.jit
def _hinge(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    gap = 1.0 - beta * (a - b)
    slope = tl.where(gap <= 0, 0.0, beta)
    return tl.where(gap <= 0, 0.0, gap), -slope, slope


@triton.jit
def _robust(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    scale = 1.0 / (1.0 - 2.0 * eps)
    value, slope = _smoothed(beta * (a - b), (1.0 - eps) * scale, -eps * scale)
    return value, beta * slope, -beta * slope


@triton.jit
def _sigmoid_norm(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    uw, ul = beta / nw, beta / nl
    value, slope = _smoothed(a * uw - b * ul, 1.0 - eps, eps)
    return value, slope * uw, -slope * ul


@triton.jit
def _sft(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    return -lw, -1.0, 0.0


@triton.jit
def _loss(NAME: tl.constexpr, lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE: tl.constexpr):
    if NAME == "sigmoid":
        result = _sigmoid(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    elif NAME == "ipo":
        result = _ipo(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    elif NAME == "hinge":
        result = _hinge(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    elif NAME == "robust":
        result = _robust(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    elif NAME == "sigmoid_norm":
        result = _sigmoid_norm(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    else:
        tl.static_assert(NAME == "sft", "the kernel has no such loss")
        result = _sft(lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE)
    return result


@triton.jit
def _weighted(
    LOSSES: tl.constexpr,
    coefficients,
    lw,
    ll,
    a,
    b,
    nw,
    nl,
    beta,
    eps,
    LENGTH_AVERAGE: tl.constexpr,
):
    """The sum of coefficient times loss, and its slopes by lw and by ll."""
    loss = tl.zeros((), tl.float64)
    slope_w, slope_l = loss, loss
    for k in tl.static_range(len(LOSSES)):
        value, by_w, by_l = _loss(  # Triton 3.6 takes names out of a tuple as plain strings
            tl.constexpr(LOSSES[k]), lw, ll, a, b, nw, nl, beta, eps, LENGTH_AVERAGE
        )
        loss += coefficients[k] * value
        slope_w += coefficients[k] * by_w
        slope_l += coefficients[k] * by_l
    return loss, slope_w, slope_l


@triton.jit
def _sum(ptr, count, stride, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `count` values, in an order that `count` alone decides."""
    offs = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, count, BLOCK):
        # Past L1: it does not see what other programs write.
        values = tl.load(
            ptr + (start + offs) * stride, mask=start + offs < count, other=0, cache_modifier=".cg"
        )
        total += values.to(DTYPE)
    return tl.sum(total, axis=0)


@triton.jit
def _fill(ptr, count, value, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK).to(tl.int64)
    values = tl.zeros((BLOCK,), tl.float32) + value.to(tl.float32)
    for start in range(0, count, BLOCK):
        tl.store(ptr + start + offs, values, mask=start + offs < count)


@triton.jit
def preference_kernel(
    logp_ptr,
    lengths_ptr,
    reference_ptr,
    logps_ptr,
    rewards_ptr,
    slopes_ptr,
    losses_ptr,
    loss_ptr,
    arrivals_ptr,
    stride_t,
    beta: tl.float64,
    eps: tl.float64,
    coefficients,
    LOSSES: tl.constexpr,
    LENGTH_AVERAGE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair. Whichever program arrives last adds up the losses of all, in their order.

    beta, eps: a number without its type would reach a device in fp32, where margins amplify its rounding.
        A coefficient scales what comes out, which is rounded to fp32 anyway.
    """
    pid_p = tl.program_id(0).to(tl.int64)
    chosen, rejected = 2 * pid_p, 2 * pid_p + 1
    count_w, count_l = tl.load(lengths_ptr + chosen), tl.load(lengths_ptr + rejected)
    first_w = _sum(lengths_ptr, chosen, 1, tl.int64, BLOCK)
    first_l = first_w + count_w
    # Rounded to fp32, as references are: where policy and reference are one, a log-ratio is 0.
    lw = _sum(logp_ptr + first_w * stride_t, count_w, stride_t, tl.float64, BLOCK).to(tl.float32)
    ll = _sum(logp_ptr + first_l * stride_t, count_l, stride_t, tl.float64, BLOCK).to(tl.float32)
    tl.store(logps_ptr + chosen, lw)
    tl.store(logps_ptr + rejected, ll)
    lw, ll = lw.to(tl.float64), ll.to(tl.float64)
    a, b = lw, ll
    if HAS_REFERENCE:
        a -= tl.load(reference_ptr + chosen).to(tl.float64)
        b -= tl.load(reference_ptr + rejected).to(tl.float64)
    beta, eps = tl.cast(beta, tl.float64), tl.cast(eps, tl.float64)
    tl.store(rewards_ptr + chosen, (beta * a).to(tl.float32))
    tl.store(rewards_ptr + rejected, (beta * b).to(tl.float32))
    loss, slope_w, slope_l = _weighted(
        LOSSES,
        coefficients,
        lw,
        ll,
        a,
        b,
        count_w.to(tl.float64),
        count_l.to(tl.float64),
        beta,
        eps,
        LENGTH_AVERAGE,
    )
    _fill(slopes_ptr + first_w, count_w, slope_w, BLOCK)
    _fill(slopes_ptr + first_l, count_l, slope_l, BLOCK)
    tl.store(losses_ptr + pid_p, loss)
    tl.debug_barrier()  # the loss is stored before this program counts as arrived
    pairs = tl.num_programs(0)
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == pairs - 1:
        tl.store(loss_ptr, _sum(losses_ptr, pairs, 1, tl.float64, BLOCK).to(tl.float32))


def _check(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    losses: tuple[str, ...],
    coefficients: tuple[float, ...],
) -> None:
    if logp_T.dim() != 1 or lengths_S.dim() != 1 or len(lengths_S) % 2:
        raise ValueError(f"logp {tuple(logp_T.shape)}, lengths {tuple(lengths_S.shape)}")
    if logp_T.dtype != torch.float32 or lengths_S.dtype != torch.int64:
        raise ValueError(f"logp is {logp_T.dtype}, lengths are {lengths_S.dtype}: fp32 and int64")
    if reference_S is not None and reference_S.shape != lengths_S.shape:
        raise ValueError(f"reference {tuple(reference_S.shape)}, lengths {tuple(lengths_S.shape)}")
    if not all(x is None or x.is_contiguous() for x in (lengths_S, reference_S)):
        raise ValueError("lengths and reference must be contiguous")
    if len(losses) != len(coefficients):
        raise ValueError(f"{len(losses)} losses, {len(coefficients)} coefficients")


def preference(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    losses: tuple[str, ...],
    coefficients: tuple[float, ...],
    *,
    beta: float,
    label_smoothing: float,
    length_average: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32: the loss [], sums of the sequences [S], beta times their log-ratios [S], dloss/dlogp [T].

    The loss is the sum over pairs and k of coefficients[k] * losses[k]. Lengths, int64, add up to T:
    they are not checked here. logp_T has any stride.
    """
    _check(logp_T, lengths_S, reference_S, losses, coefficients)
    P, new = len(lengths_S) // 2, logp_T.new_empty
    loss, logps_S, rewards_S, slopes_T = new(()), new(2 * P), new(2 * P), new(len(logp_T))
    if P == 0:
        return loss.zero_(), logps_S, rewards_S, slopes_T
    with on_device(logp_T):
        preference_kernel[(P,)](
            logp_ptr=logp_T,
            lengths_ptr=lengths_S,
            reference_ptr=reference_S,
            logps_ptr=logps_S,
            rewards_ptr=rewards_S,
            slopes_ptr=slopes_T,
            losses_ptr=new(P, dtype=torch.float64),
            loss_ptr=loss,
            arrivals_ptr=lengths_S.new_zeros((), dtype=torch.int32),
            stride_t=logp_T.stride(0),
            beta=float(beta),
            eps=float(label_smoothing),
            coefficients=tuple(map(float, coefficients)),
            LOSSES=tuple(losses),
            LENGTH_AVERAGE=length_average,
            HAS_REFERENCE=reference_S is not None,
            BLOCK=BLOCK if logp_T.is_cuda else INTERPRETER_BLOCK,
            num_warps=NUM_WARPS,
        )
    return loss, logps_S, rewards_S, slopes_T
