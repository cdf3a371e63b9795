"""From token log-probabilities to the loss of pairs in one Triton kernel, eager and compiled.

For the losses that the table marks with `kernel`; `preference` decides. The slope of every token is known
in the forward pass, so backward is one multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.ops.once import once_differentiable


def fused_preference(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    losses: tuple[str, ...],
    coefficients: tuple[float, ...],
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], logps_S and rewards_S. The loss is the sum over pairs and k of coefficients[k] * losses[k].

    Args:
        logp_T, lengths_S, reference_S: as `check_sequences` lets them through, logp_T in fp32.
        options: `beta`, `label_smoothing`, `length_average`, as in `LossOptions`.
    """
    reference_S = None if reference_S is None else reference_S.contiguous()
    lengths_S = lengths_S.contiguous()
    if torch.compiler.is_compiling():
        loss, logps_S, rewards_S, _ = torch.ops.dpo_fast.preference(
            logp_T, lengths_S, reference_S, losses, coefficients, **options
        )
        return loss, logps_S.detach(), rewards_S.detach()
    return _Preference.apply(logp_T, lengths_S, reference_S, losses, coefficients, options)


def check_sequences(
    logp_T: Tensor, lengths_S: Tensor, reference_S: Tensor | None, paired: bool = True
) -> None:
    """Raises ValueError unless these are tokens of sequences, or of pairs. Waits for nothing on a GPU."""
    S = lengths_S.shape[0] if lengths_S.dim() == 1 else 0
    if logp_T.dim() != 1 or lengths_S.dim() != 1 or (paired and S % 2):
        raise ValueError(
            "expected logp [T] and lengths [S] of chosen and rejected in turn, S even; got logp "
            f"{tuple(logp_T.shape)}, lengths {tuple(lengths_S.shape)}"
        )
    if logp_T.dtype not in (torch.float32, torch.float64) or lengths_S.dtype != torch.int64:
        raise ValueError(
            f"logp is {logp_T.dtype}, lengths are {lengths_S.dtype}; expected torch.float32 (or "
            "float64) and torch.int64"
        )
    if reference_S is not None and (
        reference_S.shape != lengths_S.shape or reference_S.dtype != torch.float32
    ):
        raise ValueError(
            f"reference is {reference_S.dtype} {tuple(reference_S.shape)}; expected torch.float32 "
            f"({len(lengths_S)},)"
        )
    devices = {str(x.device) for x in (logp_T, lengths_S, reference_S) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(devices)}")
    total = lengths_S.sum()  # any other would have foreign memory read
    if logp_T.is_cuda or torch.compiler.is_compiling():
        message = "lengths must add up to the tokens of logp, and none be below 0"
        torch._assert_async((total == logp_T.shape[0]) & (lengths_S >= 0).all(), message)
    elif total != len(logp_T) or (lengths_S < 0).any():
        raise ValueError(
            f"lengths must add up to the {len(logp_T)} tokens of logp, and none be below 0; they add "
            f"up to {total.item()}"
        )


def _launch(*arguments, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], logps [S], rewards [S], and the slope of every token, [T]."""
    from dpo_fast.kernels import preference as kernels

    return kernels.preference(*arguments, **options)


class _Preference(torch.autograd.Function):
    """For eager code."""

    @staticmethod
    def forward(ctx, logp_T, lengths_S, reference_S, losses, coefficients, options):
        loss, logps_S, rewards_S, slopes_T = _launch(
            logp_T, lengths_S, reference_S, losses, coefficients, **options
        )
        ctx.save_for_backward(slopes_T)
        ctx.mark_non_differentiable(logps_S, rewards_S)
        ctx.set_materialize_grads(False)
        return loss, logps_S, rewards_S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (slopes_T,) = ctx.saved_tensors
        return None if grad is None else slopes_T * grad, None, None, None, None, None


@torch.library.custom_op(
    "dpo_fast::preference",
    mutates_args=(),
    schema="(Tensor logp, Tensor lengths, Tensor? reference, str[] losses, float[] coefficients, "
    "float beta, float label_smoothing, bool length_average) -> (Tensor, Tensor, Tensor, Tensor)",
)
def preference(logp_T, lengths_S, reference_S, losses, coefficients, *options):
    """For compiled code: as `_launch`."""
    options = dict(zip(("beta", "label_smoothing", "length_average"), options))
    return _launch(logp_T, lengths_S, reference_S, tuple(losses), tuple(coefficients), **options)


@preference.register_fake
def _(logp_T, lengths_S, *_):
    logps_S = logp_T.new_empty(lengths_S.shape[0])
    return (
        logp_T.new_empty(()),
        logps_S,
        torch.empty_like(logps_S),
        logp_T.new_empty(logp_T.shape[0]),
    )


def _preference_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.set_materialize_grads(False)


def _preference_backward(ctx, grad, *_):
    (slopes_T,) = ctx.saved_tensors
    return None if grad is None else slopes_T * grad, *(None,) * 7


preference.register_autograd(
    once_differentiable(_preference_backward), setup_context=_preference_context
)
