"""`logits_logp`: log-probabilities of targets from logits that already exist."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.linear_logp.call import DTYPES, OF_DTYPES, check_targets
from dpo_fast.ops.linear_logp.dtensor import plain_input
from dpo_fast.ops.once import once_differentiable

CHUNK_ELEMENTS = 1 << 20  # 4 MiB: the largest fp32 copy of logits that exists at a time


class _LogitsLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets_T, temperature, implementation):
        logp_T, norm_T2 = forward(logits, targets_T, temperature, implementation)
        ctx.save_for_backward(logits, targets_T, norm_T2)
        ctx.temperature, ctx.implementation = temperature, implementation
        return logp_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        gradient = backward(grad_T, *ctx.saved_tensors, ctx.temperature, ctx.implementation)
        return gradient, None, None, None


def forward(
    logits: Tensor, targets_T: Tensor, temperature: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """logp [T], and what normalises each row, [T, 2]: the largest logit, and the logarithm of the sum of
    exp((logit - largest) / temperature). Their sum would lose digits that gradients need near 1e4."""
    run = _torch_forward if implementation == "torch" else _triton_forward
    parts, first = [], 0
    for logits_TV in _matrices(logits):
        stop = first + logits_TV.shape[0]
        parts.append(run(logits_TV, targets_T[first:stop], temperature))
        first = stop
    return tuple(map(torch.cat, zip(*parts))) if len(parts) > 1 else parts[0]


def backward(
    grad_T: Tensor,
    logits: Tensor,
    targets_T: Tensor,
    norm_T2: Tensor,
    temperature: float,
    implementation: str,
) -> Tensor:
    """The gradient of the logits, in their shape and dtype, contiguous."""
    grad_T = grad_T.to(norm_T2.dtype).contiguous()
    out_TV = logits.new_empty(len(targets_T), logits.shape[-1])
    run = _torch_backward if implementation == "torch" else _triton_backward
    first = 0
    for logits_TV in _matrices(logits):
        rows = slice(first, first + logits_TV.shape[0])
        run(grad_T[rows], logits_TV, targets_T[rows], norm_T2[rows], temperature, out_TV[rows])
        first = rows.stop
    return out_TV.view(logits.shape)


def logits_logp(
    logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0, implementation: str = "auto"
) -> Tensor:
    """Log-probability of each target: logp_t = z_t,y_t - logsumexp_v z_tv, z = logits / temperature

    Args:
        logits_TV: [T, V] or [..., V], fp32, bf16, fp16 or fp64, any strides: a shifted slice like
            `logits[:, :-1]` is read in place. No fp32 copy of it is made.
        targets_T: [T] or [...], int64 (or other integers) in 0..V-1.
        implementation: `auto`, `torch` or `triton`. A name that cannot run here is an error.

    Returns:
        The shape of the targets, fp32 (fp64 for fp64 logits). Its gradient has the logits' dtype.

    Raises:
        ValueError: shapes, dtypes, temperature or targets that do not fit.
        UnavailableError: the named implementation cannot run on this device.
    """
    logits_TV = plain_input(logits_TV, "logits")
    targets_T = as_int64(plain_input(targets_T, "targets"), "targets")
    _check(logits_TV, targets_T, temperature)
    name = choose_implementation(
        "logits_logp", logits_TV.device, logits_TV.dtype, implementation
    ).name
    flat_T = targets_T.reshape(-1).contiguous()
    if torch.compiler.is_compiling():
        logp_T, _ = torch.ops.dpo_fast.logits_logp(logits_TV, flat_T, temperature, name)
        return logp_T.view(targets_T.shape)
    check_targets(flat_T, logits_TV.shape[-1])
    return _LogitsLogp.apply(logits_TV, flat_T, temperature, name).view(targets_T.shape)


def _check(logits_TV: Tensor, targets_T: Tensor, temperature: float) -> None:
    if logits_TV.dim() < 1 or logits_TV.shape[:-1] != targets_T.shape or logits_TV.shape[-1] == 0:
        raise ValueError(
            f"expected logits [..., V] and targets [...]; got logits {tuple(logits_TV.shape)}, "
            f"targets {tuple(targets_T.shape)}"
        )
    if logits_TV.dtype not in DTYPES:
        raise ValueError(f"logits are {logits_TV.dtype}; expected {OF_DTYPES}")
    if logits_TV.device != targets_T.device:
        raise ValueError(f"logits are on {logits_TV.device}, targets on {targets_T.device}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be finite and greater than 0")


def _matrices(logits: Tensor) -> list[Tensor]:
    """[rows, V] views that cover the logits in order; one, unless the leading strides forbid it."""
    try:
        return [logits.view(math.prod(logits.shape[:-1]), logits.shape[-1])]
    except RuntimeError:  # `view` raises rather than copy
        return [matrix for item in logits.unbind(0) for matrix in _matrices(item)]


def _chunks(logits_TV: Tensor):
    rows = max(1, CHUNK_ELEMENTS // logits_TV.shape[1])
    for start in range(0, logits_TV.shape[0], rows):
        yield slice(start, min(start + rows, logits_TV.shape[0]))


def _copied(logits_TV: Tensor) -> Tensor:
    """A fresh copy of a chunk, in fp32 (fp64 for fp64)."""
    return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32), copy=True)


def _torch_forward(logits_TV: Tensor, targets_T: Tensor, temperature: float):
    precision = torch.promote_types(logits_TV.dtype, torch.float32)
    logp_T = logits_TV.new_empty(len(targets_T), dtype=precision)
    norm_T2 = logits_TV.new_empty(len(targets_T), 2, dtype=precision)
    for rows in _chunks(logits_TV):
        z = _copied(logits_TV[rows])
        maximum = z.amax(-1, keepdim=True)
        z.sub_(maximum).div_(temperature)  # distances are scaled: a scaled logit would be rounded
        target = z.gather(1, targets_T[rows, None]).squeeze(1)
        log_total = z.exp_().sum(-1).log_()
        logp_T[rows] = target - log_total
        norm_T2[rows] = torch.stack([maximum.squeeze(1), log_total], 1)
    return logp_T, norm_T2


def _torch_backward(grad_T, logits_TV, targets_T, norm_T2, temperature, out_TV) -> None:
    for rows in _chunks(logits_TV):
        maximum, log_total = norm_T2[rows].split(1, dim=1)
        scale = (grad_T[rows] / temperature)[:, None]
        z = _copied(logits_TV[rows]).sub_(maximum).div_(temperature).sub_(log_total)
        z.exp_().mul_(-scale)
        out_TV[rows] = z.scatter_add_(1, targets_T[rows, None], scale)


def _triton_forward(logits_TV: Tensor, targets_T: Tensor, temperature: float):
    from dpo_fast.kernels import logits_logp as kernels

    return kernels.forward(logits_TV, targets_T, temperature)


def _triton_backward(grad_T, logits_TV, targets_T, norm_T2, temperature, out_TV) -> None:
    from dpo_fast.kernels import logits_logp as kernels

    kernels.backward(grad_T, logits_TV, targets_T, norm_T2, temperature, out_TV)
