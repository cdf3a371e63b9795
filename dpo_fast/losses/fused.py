"""From token log-probabilities to the loss of pairs in one kernel, eager and compiled."""

from __future__ import annotations

import torch
from torch import Tensor


class _Preference(torch.autograd.Function):
    """The slope of every token is known in the forward pass: backward is one multiplication."""

    @staticmethod
    def forward(ctx, logp_T, lengths_S, reference_S, losses, coefficients, options):
        from dpo_fast.kernels import preference as kernels

        loss, logps_S, rewards_S, slopes_T = kernels.preference(
            logp_T, lengths_S, reference_S, losses, coefficients, **options
        )
        ctx.save_for_backward(slopes_T)
        ctx.mark_non_differentiable(logps_S, rewards_S)
        ctx.set_materialize_grads(False)
        return loss, logps_S, rewards_S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        (slopes_T,) = ctx.saved_tensors
        return None if grad is None else slopes_T * grad, None, None, None, None, None


def fused_preference(
    logp_T: Tensor,
    lengths_S: Tensor,
    reference_S: Tensor | None,
    losses: tuple[str, ...],
    coefficients: tuple[float, ...],
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dpo_fast.losses.preference` by the Triton kernel: loss, logps_S and rewards_S.

    The loss is the sum over pairs and k of coefficients[k] * losses[k]. `options` are the fields of
    `LossOptions`. Arguments are those that `check_sequences` lets through, logp_T in fp32.
    """
    reference_S = None if reference_S is None else reference_S.contiguous()
    if torch.compiler.is_compiling():
        loss, logps_S, rewards_S, _ = torch.ops.dpo_fast.preference(
            logp_T, lengths_S.contiguous(), reference_S, losses, coefficients, **options
        )
        return loss, logps_S.detach(), rewards_S.detach()
    return _Preference.apply(
        logp_T, lengths_S.contiguous(), reference_S, losses, coefficients, options
    )


def check_sequences(
    logp_T: Tensor, lengths_S: Tensor, reference_S: Tensor | None, paired: bool = True
) -> None:
    """Raises ValueError unless these are tokens of sequences, or pairs. Waits for nothing on a GPU."""
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


# The same kernel as a custom operator, which compiled code calls as torch.ops.dpo_fast.preference.


@torch.library.custom_op(
    "dpo_fast::preference",
    mutates_args=(),
    schema="(Tensor logp, Tensor lengths, Tensor? reference, str[] losses, float[] coefficients, "
    "float beta, float label_smoothing, bool length_average) -> (Tensor, Tensor, Tensor, Tensor)",
)
def preference(
    logp, lengths, reference, losses, coefficients, beta, label_smoothing, length_average
):
    """loss [], logps [S], rewards [S], and the slope of every token, [T], by the Triton kernel."""
    from dpo_fast.kernels import preference as kernels

    return kernels.preference(
        logp,
        lengths,
        reference,
        tuple(losses),
        tuple(coefficients),
        beta=beta,
        label_smoothing=label_smoothing,
        length_average=length_average,
    )


@preference.register_fake
def _(logp, lengths, reference, losses, coefficients, beta, label_smoothing, length_average):
    sequences = logp.new_empty(lengths.shape[0])
    return logp.new_empty(()), sequences, torch.empty_like(sequences), logp.new_empty(logp.shape[0])


def _preference_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.set_materialize_grads(False)


def _preference_backward(ctx, grad, *_):
    (slopes,) = ctx.saved_tensors
    return None if grad is None else slopes * grad, *(None,) * 7


preference.register_autograd(_preference_backward, setup_context=_preference_context)
