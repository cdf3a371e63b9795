"""`linear_logp`: log-probabilities of targets straight from hidden states and the head's weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.ops.linear_logp.plan import HeadPlan, default_workspace_bytes, plan
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard, whole_vocabulary

EXTRAS = ("entropy", "log_sum_p2", "mean_logit", "is_top1")


class LinearLogp(NamedTuple):
    """Per scored token, [T]. `logp` is differentiable; the extras are not, and None unless asked for."""

    logp: Tensor
    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass(frozen=True)
class HeadOptions:
    """z = cap(logit_scale * (h W^T + b)) / temperature, cap(y) = softcap * tanh(y / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ValueError(f"logit_scale={self.logit_scale} must be finite and not 0")
        for name in ("softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be finite and greater than 0")


class _LinearLogp(torch.autograd.Function):
    """One node, so that a sharded weight is gathered once for the forward and once for the backward."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias, targets_T, options, extras, plan, schedule, shard):
        if shard is not None:
            targets_T = targets_T - shard.first  # outside 0..V-1: another rank has it
        with _own_precision(hidden_TD):
            outputs, saved = schedule.forward(
                hidden_TD, weight_VD, bias, targets_T, options, extras, plan, shard
            )
        ctx.names = tuple(saved)
        # A leaf weight stays on ctx itself: DeepSpeed swaps the storage of a sharded parameter, and
        # has it gathered again when backward runs. Everything else gets autograd's version check.
        ctx.weight = weight_VD if weight_VD.is_leaf else None
        hidden_TD = None if plan.schedule == "frozen" else hidden_TD  # not read again
        weight_VD = None if ctx.weight is not None else weight_VD
        ctx.save_for_backward(hidden_TD, bias, targets_T, weight_VD, *saved.values())
        ctx.options, ctx.plan, ctx.schedule, ctx.shard = options, plan, schedule, shard
        ctx.set_materialize_grads(False)
        logp_T, *rest = (outputs[name] for name in ("logp", *extras))
        ctx.mark_non_differentiable(*rest)
        return logp_T, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_T, *_):
        gradients = (None, None, None)
        if grad_T is not None:
            hidden_TD, bias, targets_T, weight_VD, *values = ctx.saved_tensors
            with _own_precision(grad_T):
                hidden_grad, *head_grads = ctx.schedule.backward(
                    grad_T,
                    hidden_TD,
                    ctx.weight if weight_VD is None else weight_VD,
                    bias,
                    targets_T,
                    ctx.options,
                    ctx.plan,
                    dict(zip(ctx.names, values)),
                    ctx.needs_input_grad[:3],
                )
            if ctx.shard is not None and hidden_grad is not None:
                hidden_grad = ctx.shard.sum(hidden_grad.float()).to(hidden_grad.dtype)
            gradients = (hidden_grad, *head_grads)
        return *gradients, *(None,) * 6


def linear_logp(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    extras: tuple[str, ...] = (),
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabShard | None = None,
) -> LinearLogp:
    """Log-probability of each target under a linear head, without a [T, V] tensor of logits.

    logp_t = z_t,y_t - logsumexp_v z_tv,   z = cap(logit_scale * (h W^T + b)) / temperature

    Args:
        hidden_TD: [T, D], fp32, bf16, fp16 or fp64, any strides. Only rows that are scored.
        weight_VD: [V, D], the head's weight, same dtype and device (under autocast both are cast).
        targets_T: [T], int64 in 0..V-1.
        bias: [V] or None.
        logit_scale, softcap, temperature: see the formula (Cohere, Gemma 2, sampling).
        extras: any of `entropy`, `log_sum_p2`, `mean_logit`, `is_top1`; computed in the same pass,
            without gradients.
        implementation: `auto`, `torch`, `triton`, or `cuda` for the kernels of csrc (sm_90a, bf16), which
            `auto` does not choose. A name that cannot run here is an error.
        workspace_bytes: memory for exponentials kept between forward and backward; 0 recomputes
            them all. Default: 1 GiB on a CPU, a sixteenth of the memory of a GPU.
        shard: the weight (and bias) are this rank's slice of the vocabulary, `VocabShard.of(weight)`.
            Hidden states and targets are the same on every rank, and so are all results and the
            gradient of the hidden states. All ranks of the group must call.

    Returns:
        `LinearLogp`, each field [T] in fp32 (fp64 for fp64 inputs) from fp32 logits.

    Raises:
        ValueError: shapes, dtypes, options or targets that do not fit.
        UnavailableError: the named implementation cannot run on this device.
    """
    hidden_TD, weight_VD, bias = _autocast(hidden_TD, weight_VD, bias)
    if torch.compiler.is_compiling() and shard is None:
        return _compiled(
            hidden_TD,
            weight_VD,
            targets_T,
            bias,
            logit_scale,
            softcap,
            temperature,
            tuple(extras),
            implementation,
            workspace_bytes,
        )
    options = HeadOptions(logit_scale, softcap, temperature)
    check_call(hidden_TD, weight_VD, targets_T, bias, extras)
    check_targets(targets_T, whole_vocabulary(weight_VD, shard))
    name = choose_implementation(
        "linear_logp", hidden_TD.device, hidden_TD.dtype, implementation
    ).name
    schedule = schedule_of(name)
    chosen = plan_call(hidden_TD, weight_VD, bias, workspace_bytes, name, shard)
    values = _LinearLogp.apply(
        hidden_TD, weight_VD, bias, targets_T, options, tuple(extras), chosen, schedule, shard
    )
    return LinearLogp(**dict(zip(("logp", *extras), values)))


def _compiled(hidden_TD, weight_VD, targets_T, bias, *options) -> LinearLogp:
    """The same through the custom operator, which a compiler does not look into."""
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias)]
    *factors, extras, implementation, workspace_bytes = options
    logp_T, *rest = torch.ops.dpo_fast.linear_logp(
        hidden_TD,
        weight_VD,
        targets_T,
        bias,
        *factors,
        ",".join(extras),
        implementation,
        workspace_bytes,
        needs,
    )
    return LinearLogp(logp_T, **{name: x.detach() for name, x in zip(extras, rest)})


def plan_call(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    workspace_bytes: int | None,
    implementation: str,
    shard: VocabShard | None = None,
) -> HeadPlan:
    """The plan for these tensors: gradients that nothing asks for are not computed."""
    grad = torch.is_grad_enabled()
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_TD.device)
    return plan(
        hidden_TD.shape[0],
        weight_VD.shape[0] if shard is None else shard.largest,
        weight_VD.shape[1],
        hidden_TD.dtype,
        needs_hidden=grad and hidden_TD.requires_grad,
        needs_head=grad and any(x is not None and x.requires_grad for x in (weight_VD, bias)),
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )


def _own_precision(like: Tensor) -> torch.autocast:
    """Autocast has acted on the operands already; a schedule's products are in the precision that it picks
    for each, and exponentials do not fit into fp16."""
    return torch.autocast(like.device.type, enabled=False)


def _autocast(hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None):
    """Under autocast behave like `torch.nn.functional.linear`: operands in autocast's dtype."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device) or hidden_TD.dtype == torch.float64:
        return hidden_TD, weight_VD, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype), None if bias is None else bias.to(dtype)


def check_call(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias: Tensor | None, extras: tuple
) -> None:
    shapes = f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)}, targets " + str(
        tuple(targets_T.shape)
    )
    fits = hidden_TD.dim() == 2 and weight_VD.dim() == 2 and targets_T.dim() == 1
    if not fits or hidden_TD.shape != (targets_T.shape[0], weight_VD.shape[1]):
        raise ValueError(f"expected hidden [T, D], weight [V, D] and targets [T]; got {shapes}")
    if weight_VD.shape[0] == 0 or weight_VD.shape[1] == 0:
        raise ValueError(f"the head is empty: {shapes}")
    if not hidden_TD.is_floating_point() or hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden is {hidden_TD.dtype} and weight is {weight_VD.dtype}: both must have the same "
            "floating dtype; cast one, or run under torch.autocast"
        )
    if bias is not None and (bias.shape != weight_VD.shape[:1] or bias.dtype != weight_VD.dtype):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}; expected {weight_VD.dtype} "
            f"({weight_VD.shape[0]},)"
        )
    if targets_T.dtype != torch.int64:
        raise ValueError(f"targets are {targets_T.dtype}; expected torch.int64")
    devices = {str(x.device) for x in (hidden_TD, weight_VD, targets_T, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(devices)}")
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown or len(set(extras)) != len(extras):
        raise ValueError(f"extras={tuple(extras)}: choose from {EXTRAS}, each at most once")


def check_targets(targets_T: Tensor, V: int) -> None:
    """Targets outside 0..V-1 would read foreign memory. Waits for nothing on a GPU."""
    inside = ((targets_T >= 0) & (targets_T < V)).all()
    message = f"targets must be in 0..{V - 1}: drop rows to be ignored before the head"
    if targets_T.device.type == "cuda":
        torch._assert_async(inside, message)
    elif not inside:
        wrong = targets_T[(targets_T < 0) | (targets_T >= V)][0].item()
        raise ValueError(f"{message}; got {wrong}")


def schedule_of(name: str) -> ModuleType:
    """The schedule of an implementation: a module with `forward` and `backward`.

    Imported on first use, because triton is heavy and not on every machine.
    """
    if name == "torch":
        from dpo_fast.ops.linear_logp import torch as schedule
    elif name == "triton":
        from dpo_fast.ops.linear_logp import triton as schedule
    else:
        from dpo_fast.ops.linear_logp import cuda as schedule
    return schedule
